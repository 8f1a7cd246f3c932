"""Inside the engine and on transformers the same tokens are kept and the same answers given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_pair import CHUNK, Prompt

METHODS = ("divprune", "dycoke-ttm", "evs", "frame-subsample", "random:seed=3", "uniform", "v-cast", "vidcom2")


@pytest.mark.parametrize("method", METHODS)
def test_kept_tokens_and_answers(same: Callable[..., Any], method: str) -> None:
    """One video that is longer than a prefill chunk when whole."""
    same(method, 0.3 if method != "dycoke-ttm" else 0.5, [Prompt()], fresh=True)


def test_prompts_shrink(pair: Any) -> None:
    """Of a video of n patches a quarter of n stays."""
    lengths = {}
    for retention in (0.25, 0.5, 0.75):
        pair.choose("uniform", retention)
        lengths[retention] = pair.ask_engine([Prompt(videos=(7,), frames=16)])[0].length
    assert lengths[0.75] - lengths[0.5] == lengths[0.5] - lengths[0.25] > 0


@pytest.mark.parametrize("method", ("divprune", "vidcom2", "evs"))
def test_two_videos(same: Callable[..., Any], method: str) -> None:
    """Both are pruned by themselves, and the text between and behind them stays where it was."""
    same(method, 0.4, [Prompt(videos=(1, 2))], fresh=True)


@pytest.mark.parametrize("method", ("evs", "dycoke-ttm"))
def test_image_and_video(same: Callable[..., Any], method: str) -> None:
    """Pictures stay whole, in both orders of size."""
    same(method, 0.5, [Prompt(videos=(3,), images=(4,))], fresh=True)


@pytest.mark.parametrize("method", ("divprune", "vidcom2"))
def test_a_chunk_ends_inside_a_video(same: Callable[..., Any], pair: Any, method: str) -> None:
    """A video that stays longer than a chunk is read in several."""
    answer = same(method, 0.9, [Prompt(videos=(5,), frames=12, question="Why?")])[0]
    assert answer.length > 2 * CHUNK


def test_requests_of_different_shapes_together(same: Callable[..., Any]) -> None:
    """Continuous batching over prompts that begin and end at different steps."""
    prompts = [
        Prompt(videos=(10,)),
        Prompt(videos=(11,), frames=12, question="Where is the ball at the end?"),
        Prompt(videos=(), question="What is a video?"),
        Prompt(videos=(12, 13), frames=4),
    ]
    same("divprune", 0.35, prompts, fresh=True)


def test_prefix_cache(same: Callable[..., Any]) -> None:
    """A repeated prompt and another question about the same video read the cache and answer as always."""
    first = same("divprune", 0.8, [Prompt(videos=(20,))])[0]
    again = same("divprune", 0.8, [Prompt(videos=(20,))])[0]
    other = same("divprune", 0.8, [Prompt(videos=(20,), question="Which shape is on the left?")])[0]
    assert first.cached == 0 < min(again.cached, other.cached)


def test_caches_tell_methods_apart(same: Callable[..., Any]) -> None:
    """Another method, option or rate with as many tokens never reads what was cached for this one."""
    for method in ("uniform", "random:seed=0", "random:seed=1", "divprune"):
        assert same(method, 0.8, [Prompt(videos=(21,))])[0].cached < 32
    same("divprune", 0.79, [Prompt(videos=(21,))])
    assert same("divprune", 0.8, [Prompt(videos=(21,))])[0].cached > 0
