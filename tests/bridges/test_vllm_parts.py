"""The parts of the vLLM plug-in that need no engine: choices, families, counts and positions."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokensieve.bridges.vllm import FAMILIES, PREFIX, arguments, engine_arguments, qualifying_methods, server_flags
from tokensieve.bridges.vllm.choice import choice_of, is_ours, read_choice, retention_of
from tokensieve.bridges.vllm.families import checked, family_of
from tokensieve.bridges.vllm.positions import fill_positions, from_channels, prompt_positions, to_channels
from tokensieve.bridges.vllm.pruning import grid_layout, kept_count, kept_tokens
from tokensieve.core.registry import build
from tokensieve.errors import HostError, MethodError

QWEN = FAMILIES["Qwen2_5_VLForConditionalGeneration"]
ONEVISION = FAMILIES["LlavaOnevisionForConditionalGeneration"]


def test_a_choice_carries_method_options_and_retention() -> None:
    choice = read_choice("tokensieve:vidcom2:temperature=0.02", 0.9)
    assert choice.retention == 0.1
    assert (choice.method.temperature, choice.method.exact_total) == (0.02, True)  # type: ignore[attr-defined]
    config = SimpleNamespace(video_pruning_method=choice.text, video_pruning_rate=0.9)
    assert choice_of(config) == choice
    assert choice_of(SimpleNamespace(video_pruning_method="evs", video_pruning_rate=0.9)) is None
    assert choice_of(None) is None


def test_names_of_the_engine_stay_the_engines() -> None:
    assert not is_ours(None) and not is_ours("evs") and not is_ours("vidcom2")
    assert is_ours("tokensieve:evs") and is_ours("divprune")


def test_cache_keys_differ_wherever_the_kept_tokens_may() -> None:
    names = ("uniform", "random:seed=0", "random:seed=1", "vidcom2", "vidcom2:temperature=0.02")
    keys = {read_choice(name, rate).digest for name in names for rate in (0.5, 0.75)}
    assert len(keys) == 2 * len(names)
    assert read_choice("vidcom2", 0.5).digest == read_choice(PREFIX + "vidcom2", 0.5).digest


@pytest.mark.parametrize(
    ("name", "rate", "words"),
    (
        ("divprune", None, "--video-pruning-rate"),
        ("divprune", 1.0, "below 1"),
        ("divprune+fastv", 0.5, "single one"),
        ("divprume", 0.5, "divprune"),
        ("divprune:retention=0.3", 0.5, "set the rate only"),
    ),
)
def test_bad_choices(name: str, rate: float | None, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        read_choice(name, rate)


def test_rates_are_read_as_decimal_numbers() -> None:
    assert [retention_of(rate) for rate in (0.9, 0.7, 0.85)] == [0.1, 0.3, 0.15]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.slug)
def test_every_qualifying_method_keeps_what_it_states(family: Any) -> None:
    layout = grid_layout((6, 10, 14), 2)
    features = torch.randn(layout.patches, 32, generator=torch.Generator().manual_seed(0))
    names = qualifying_methods(family)
    assert {"divprune", "evs", "random", "uniform", "v-cast", "vidcom2"} <= set(names)
    for name in names:
        for rate in (0.25, 0.5, 0.9):
            choice = read_choice(name, rate)
            assert kept_tokens(choice, family, features, layout).numel() == kept_count(choice, layout), name


@pytest.mark.parametrize(
    ("name", "words"),
    (
        ("fastv", "only in front of the LLM"),
        ("tome-merge", "only leave tokens out"),
        ("visionzip", "only leave tokens out|does not give"),
        ("hiprune", "does not give"),
    ),
)
def test_other_methods_are_refused_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(MethodError, match=words) as caught:
        checked(build(name, {}), QWEN)
    assert "divprune" in str(caught.value)


def test_other_models_are_refused() -> None:
    with pytest.raises(MethodError, match=r"cannot prune InternVL.*Qwen2\.5-VL"):
        family_of("InternVLForConditionalGeneration")


def test_no_features_that_are_not_finite() -> None:
    layout = grid_layout((2, 4, 4), 2)
    with pytest.raises(MethodError, match="NaN"):
        kept_tokens(read_choice("divprune", 0.5), ONEVISION, torch.full((8, 4), torch.nan), layout)


def test_arguments_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "engine_version", lambda: "0.32.1")
    given = engine_arguments("model", "vidcom2", 0.25, {"temperature": 0.02}, dtype="float32")
    assert given == {
        "model": "model",
        "dtype": "float32",
        "video_pruning_rate": 0.75,
        "video_pruning_method": "tokensieve:vidcom2:temperature=0.02",
    }
    assert server_flags("divprune", 0.1) == [
        "--video-pruning-rate",
        "0.9",
        "--video-pruning-method",
        "tokensieve:divprune",
    ]
    assert server_flags("divprune", 1.0) == server_flags(None) == []
    monkeypatch.setattr(arguments, "engine_version", lambda: "0.33.0")
    with pytest.raises(HostError, match=r"0\.33\.0 is installed"):
        engine_arguments("model", "divprune", 0.5)
    monkeypatch.setattr(arguments, "engine_version", lambda: None)
    with pytest.raises(HostError, match="not installed"):
        engine_arguments("model", "divprune", 0.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_positions_survive_half_precision(dtype: torch.dtype) -> None:
    positions = torch.tensor([[0, 1, 127, 128, 16383, 16384, 99999]] * 3)
    numbers = from_channels(to_channels(positions, 7, torch.empty(0, dtype=dtype)))
    assert torch.equal(numbers[:, :3].T, positions)
    assert numbers[:, 3].tolist() == list(range(7)) and numbers[:, 4].eq(7).all()
    with pytest.raises(HostError, match="shorten the video"):
        to_channels(torch.full((3, 1), 128**3), 0, torch.empty(0))


VIDEO, TEXT = 9, 1


@dataclass
class Place:
    offset: int
    length: int


@dataclass
class Feature:
    grid: tuple[int, int, int]
    mm_position: Place


def whole_positions(ids: list[int], features: list[Any]) -> tuple[Tensor, int]:
    """Positions of an unpruned prompt: text counts up, a video has its steps, rows and columns."""
    parts: list[Tensor] = []
    cursor = following = 0
    for feature in features:
        text = feature.mm_position.offset - cursor
        parts.append(torch.arange(text).expand(3, -1) + following)
        following += text
        axes = torch.meshgrid(*(torch.arange(side) for side in feature.grid), indexing="ij")
        parts.append(torch.stack(axes).flatten(1) + following)
        following = int(parts[-1].max()) + 1
        cursor = feature.mm_position.offset + feature.mm_position.length
    parts.append(torch.arange(len(ids) - cursor).expand(3, -1) + following)
    positions = torch.cat(parts, 1)
    return positions, int(positions.max()) + 1 - len(ids)


@pytest.mark.parametrize("chunk", (1, 3, 7, 1000))
def test_positions_of_a_pruned_prompt(chunk: int) -> None:
    """Prefilled in chunks of any size, every token gets the position that it has without pruning."""
    grids = ((3, 2, 4), (5, 2, 2))
    generator = torch.Generator().manual_seed(chunk)
    ids: list[int] = [TEXT] * 4
    pruned: list[int] = [TEXT] * 4
    unpruned, shown, stays, kept = [], [], [True] * 4, []
    for grid in grids:
        number = grid[0] * grid[1] * grid[2]
        mask = torch.rand(number, generator=generator) < 0.4
        mask[0] = True
        kept.append(mask.nonzero().flatten())
        unpruned.append(Feature(grid, Place(len(ids), number)))
        shown.append(Feature(grid, Place(len(pruned), int(mask.sum()))))
        ids += [VIDEO] * number + [TEXT] * 3
        pruned += [VIDEO] * int(mask.sum()) + [TEXT] * 3
        stays += mask.tolist() + [True] * 3
    full, _ = whole_positions(ids, unpruned)
    expected = full[:, torch.tensor(stays)]

    def lengths(feature: Feature) -> list[int]:
        return [VIDEO] * (feature.grid[0] * feature.grid[1] * feature.grid[2])

    positions, delta = prompt_positions(whole_positions, pruned, shown, lengths)
    text = torch.tensor(pruned) == TEXT
    assert torch.equal(positions[:, text], expected[:, text])
    assert delta == int(full.max()) + 1 - len(pruned)
    alone = [whole_positions(lengths(f), [Feature(f.grid, Place(0, len(lengths(f))))])[0] for f in shown]
    channels = [to_channels(own[:, idx], 0, torch.empty(0)) for own, idx in zip(alone, kept, strict=True)]
    for begin in range(0, len(pruned), chunk):
        parts = []
        for feature, values in zip(shown, channels, strict=True):
            first = feature.mm_position.offset
            part = values[max(0, begin - first) : max(0, begin + chunk - first)]
            if len(part):
                parts.append(part)
        positions = fill_positions(pruned, parts, positions, begin, (VIDEO,))
    assert torch.equal(positions, expected)
