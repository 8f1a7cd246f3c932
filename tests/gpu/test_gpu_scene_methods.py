"""FastVID, FlashVID, PruneVid and DyCoke decide on a CUDA device as on the CPU."""

from __future__ import annotations

import pytest
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.registry import parse
from tokensieve.core.sample import HostFacts, TokenSample

pytestmark = pytest.mark.gpu

METHODS = (
    "fastvid-proxy:retention=0.25",
    "fastvid-proxy:retention=0.25,flavour=llava_video,segments=2",
    "fastvid-proxy:retention=0.25,flavour=qwen",
    "flashvid:retention=0.25",
    "flashvid:retention=0.25,selection=attended,segments=4",
    "flashvid:retention=0.25,official=true",
    "prunevid-merge:retention=0.25",
    "prunevid-merge:cluster_ratio=0.5",
    "dycoke-ttm:retention=0.4",
    "dycoke-ttm:retention=0.1",
    "dycoke-ttm:removed=0.7,official=true",
)


def _sample(device: torch.device | str, frames: int = 12, side: int = 7, dim: int = 64) -> TokenSample:
    """Three scenes whose patches change to different degrees."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(3, side * side, dim, generator=generator).repeat_interleave(frames // 3, dim=0)
    strength = torch.rand(1, side * side, 1, generator=generator)
    features = scenes + strength * torch.randn(frames, side * side, dim, generator=generator)
    attention = torch.rand(frames * side * side, generator=generator)
    signals = {"encoder.received_attention@feature": attention.to(device)}
    facts = HostFacts("llava_onevision", 28, 27, 25, False)
    layout = Layout.regular("video", frames, side, side)
    return TokenSample(features.flatten(0, 1).to(device), layout, signals, facts)


@pytest.mark.parametrize("text", METHODS)
def test_same_plan(cuda: torch.device, text: str) -> None:
    (method,) = parse(text)
    on_cpu, on_cuda = (
        method.run_tokens(_sample(device)).checked(588, method.name) for device in (torch.device("cpu"), cuda)
    )
    assert on_cuda.keep.tolist() == on_cpu.keep.tolist()
    assert 0 < on_cpu.keep.numel() < 588
    if on_cpu.features is not None:
        assert on_cuda.features is not None
        torch.testing.assert_close(on_cuda.features.cpu(), on_cpu.features, rtol=0, atol=1e-4)
