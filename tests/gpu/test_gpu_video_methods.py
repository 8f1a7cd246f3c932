"""EVS, V-CAST, UniComp and LLaVA-Scissor decide on a CUDA device as on the CPU."""

from __future__ import annotations

import pytest
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.registry import parse
from tokensieve.core.sample import TokenSample
from tokensieve.methods.unicomp import KEYS

pytestmark = pytest.mark.gpu

METHODS = (
    "evs:retention=0.4",
    "evs:retention=0.4,reference=last_kept",
    "evs:threshold=0.1",
    "v-cast:retention=0.3",
    "v-cast:retention=0.3,remainder=official",
    "unicomp:retention=0.2",
    "unicomp:retention=0.2,metric=features,automatic=true",
    "llava-scissor:retention=0.3",
    "llava-scissor:tau=0.85",
    "llava-scissor:tau=0.85,approximate=true,epsilon=0.4",
)


def _sample(device: torch.device | str, frames: int = 8, side: int = 7, dim: int = 64) -> TokenSample:
    generator = torch.Generator().manual_seed(0)
    material = torch.randn(9, dim, generator=generator)
    scene = material[torch.randint(0, 9, (side * side,), generator=generator)]
    strength = 0.8 * torch.rand(frames, side * side, 1, generator=generator)
    features = scene + strength * torch.randn(frames, side * side, dim, generator=generator)
    keys = features[..., :24] + 0.2 * torch.randn(frames, side * side, 24, generator=generator)
    signals = {KEYS: keys.flatten(0, 1).to(device)}
    return TokenSample(features.flatten(0, 1).to(device), Layout.regular("video", frames, side, side), signals)


@pytest.mark.parametrize("text", METHODS)
def test_same_plan(cuda: torch.device, text: str) -> None:
    (method,) = parse(text)
    on_cpu, on_cuda = (
        method.run_tokens(_sample(device)).checked(392, method.name) for device in (torch.device("cpu"), cuda)
    )
    assert on_cuda.keep.tolist() == on_cpu.keep.tolist()
    assert 0 < on_cpu.keep.numel() < 392
    if on_cpu.features is not None:
        assert on_cuda.features is not None
        torch.testing.assert_close(on_cuda.features.cpu(), on_cpu.features, rtol=0, atol=1e-4)
