"""Half precision: the same values in bfloat16 and float32 lead to the same selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.core.signals import SIGNALS

FRAMES, SIDE, WIDTH = 6, 8, 64
WITH_TOKENS = [
    name
    for name in tokensieve.list_methods()
    if "tokens" in tokensieve.method_class(name).stages
    # Those inside the tower have decided before; what they hand on is tested with a tower.
    and "encoder" not in tokensieve.method_class(name).stages
    and not tokensieve.method_class(name).needs_file
]
FACTS = HostFacts("llava", 28, 24, 22, True)


SIZES = {
    "n": FRAMES * SIDE * SIDE,
    "F": FRAMES,
    "B": FRAMES,
    "D": WIDTH,
    "C": WIDTH,
    "P": WIDTH,
    "M": 3,
    "T": 5,
    "H": 4,
    "d": 16,
}


def _signal(request: str, generator: torch.Generator) -> torch.Tensor:
    """Random values of the shape that the catalogue declares."""
    axes = [axis.strip() for axis in SIGNALS[request.partition("@")[0]].shape.strip("[]").split(",")]
    return torch.rand([int(axis) if axis.isdigit() else SIZES[axis] for axis in axes if axis], generator=generator)


def _sample(method: Any, dtype: torch.dtype) -> TokenSample:
    """A clip of slowly changing scenes whose values bfloat16 can hold exactly."""
    generator = torch.Generator().manual_seed(5)
    scenes = torch.randn(3, SIDE * SIDE, WIDTH, generator=generator)
    drift = torch.randn(FRAMES, SIDE * SIDE, WIDTH, generator=generator) * 0.15
    features = (scenes.repeat_interleave(2, dim=0) + drift).bfloat16().flatten(0, 1)
    signals = {request: _signal(request, generator) for request in method.signals(FACTS)}
    layout = Layout.regular("video", FRAMES, SIDE, SIDE)
    return TokenSample(features.to(dtype), layout, signals, FACTS, project=lambda states: states)


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_same_values_same_selection(name: str) -> None:
    """Scores are computed in float32 whatever the dtype of the features (invariant 7)."""
    method = tokensieve.method_class(name)(retention=0.3)
    wide = method.run_tokens(_sample(method, torch.float32))
    half = method.run_tokens(_sample(method, torch.bfloat16))
    assert torch.equal(wide.keep.cpu(), half.keep.cpu())
    if half.features is not None and wide.features is not None:
        assert half.features.dtype == torch.bfloat16
        assert torch.allclose(half.features.float(), wide.features, atol=0.05, rtol=0.01)
