"""FoPru, ToDRE, AIM and ToMe decide on a CUDA device as on the CPU, and so do the greedy functions under them."""

from __future__ import annotations

import pytest
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.registry import parse
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.methods import recoverable_compression
from tokensieve.methods.catp import select_covering

pytestmark = pytest.mark.gpu

METHODS = (
    "fopru:retention=0.3",
    "fopru:retention=0.3,strategy=row",
    "todre:retention=0.3",
    "todre:retention=0.3,pivot=center",
    "aim-merge:retention=0.25",
    "aim-merge:retention=0.3,keep_order=true",
    "tome-merge:retention=0.3",
)


def _sample(device: torch.device | str, class_token: bool, frames: int = 8, side: int = 7) -> TokenSample:
    generator = torch.Generator().manual_seed(0)
    patches = frames * side * side
    signals = {
        "encoder.mean_key@feature": torch.randn(patches, 24, generator=generator),
        "encoder.received_attention@feature": torch.rand(patches, generator=generator),
        "encoder.patch_attention@feature": torch.rand(patches, generator=generator),
        "encoder.given_attention@feature": torch.rand(patches, generator=generator),
        "encoder.class_attention@last": torch.rand(patches, generator=generator),
    }
    return TokenSample(
        torch.randn(patches, 64, generator=generator).to(device),
        Layout.regular("video", frames, side, side),
        {name: signal.to(device) for name, signal in signals.items()},
        HostFacts("any", 4, 4, 3, class_token),
    )


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("text", METHODS)
def test_same_plan(cuda: torch.device, text: str, class_token: bool) -> None:
    (method,) = parse(text)
    on_cpu, on_cuda = (
        method.run_tokens(_sample(device, class_token)).checked(392, method.name)
        for device in (torch.device("cpu"), cuda)
    )
    assert on_cuda.keep.tolist() == on_cpu.keep.tolist()
    assert 0 < on_cpu.keep.numel() < 392
    if on_cpu.features is not None:
        assert on_cuda.features is not None
        torch.testing.assert_close(on_cuda.features.cpu(), on_cpu.features, rtol=0, atol=1e-4)


def test_same_functions(cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    features, text = torch.randn(90, 32, generator=generator), torch.randn(4, 32, generator=generator)
    chosen = select_covering(features, 20, text)[1]
    assert select_covering(features.to(cuda), 20, text.to(cuda))[1].tolist() == chosen.tolist()
    states = [torch.randn(101, 32, generator=generator) for _ in range(3)]
    similarity = torch.rand(100, generator=generator)
    on_cpu = recoverable_compression.compress(*states, similarity)
    on_cuda = recoverable_compression.compress(*(state.to(cuda) for state in states), similarity.to(cuda))
    assert on_cuda.kept.tolist() == on_cpu.kept.tolist()
    torch.testing.assert_close(on_cuda.features.cpu(), on_cpu.features, rtol=0, atol=1e-4)
