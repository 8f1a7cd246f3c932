"""What the engine must not do silently."""

from __future__ import annotations

import logging

import pytest
from vllm import LLM, AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tokensieve.bridges.vllm import arguments, plugin
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny


def test_the_flag_takes_our_names() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--video-pruning-method", "tokensieve:divprune", "--video-pruning-rate", "0.75"]
    parsed = parser.parse_args(given)
    assert (parsed.video_pruning_method, parsed.video_pruning_rate) == ("tokensieve:divprune", 0.75)


@pytest.mark.parametrize(
    ("host", "method", "rate", "words"),
    (
        ("internvl", "tokensieve:divprune", 0.75, "cannot prune InternVL"),
        ("qwen2_5_vl", "tokensieve:dart", 0.75, "cuts only in front of the LLM"),
        ("qwen2_5_vl", "tokensieve:tome-merge", 0.75, "can only leave tokens out"),
        ("qwen2_5_vl", "tokensieve:divprume", 0.75, "divprune"),
        ("qwen2_5_vl", "tokensieve:divprune", None, "--video-pruning-rate"),
        ("qwen2_5_vl", "tokensieve:vidcom2:retention=0.5", 0.75, "set the rate only"),
    ),
)
def test_a_choice_that_cannot_work_ends_the_start(host: str, method: str, rate: float | None, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        LLM(str(tiny.cached(host)), dtype="float32", video_pruning_method=method, video_pruning_rate=rate)


def test_a_release_that_is_not_known_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "engine_version", lambda: "9.9.1")
    monkeypatch.setattr(EngineArgs, "create_model_config", create := lambda self: None)
    with caplog.at_level(logging.WARNING, "vllm.tokensieve"):
        plugin.register()
    assert EngineArgs.create_model_config is create
    assert "9.9.1" in caplog.text and arguments.KNOWN_VERSIONS[0] in caplog.text


@pytest.mark.parametrize(("host", "warned"), (("internvl", True), ("llava_onevision", True), ("qwen2_5_vl", False)))
def test_a_rate_that_the_engine_passes_over_is_named(host: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    engine = EngineArgs(str(tiny.cached(host)), dtype="float32", video_pruning_rate=0.75)
    with caplog.at_level(logging.WARNING, "vllm.tokensieve"):
        engine.create_model_config()
    assert ("ignores --video-pruning-rate" in caplog.text) == warned
