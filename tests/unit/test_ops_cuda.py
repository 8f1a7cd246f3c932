"""The same selections on a GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch

from tokensieve.methods import divprune, hiprune
from tokensieve.ops import temporal_merge, uniqueness
from tokensieve.ops.attention import last_query_attention, received_attention
from tokensieve.ops.diversity import farthest_point

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a CUDA device with the CPU; none found"),
]


def _clip(frames: int = 6, tokens: int = 64, dim: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(tokens, dim, generator=generator)
    return scene + 0.4 * torch.randn(frames, tokens, dim, generator=generator)


def test_vidcom2() -> None:
    keep, ratios, _ = uniqueness.select_tokens(_clip(), 0.25)
    on_device = uniqueness.select_tokens(_clip().cuda(), 0.25)
    assert on_device[0].tolist() == keep.tolist()
    torch.testing.assert_close(on_device[1].cpu(), ratios, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", ["matrix", "running"])
def test_divprune(strategy: str) -> None:
    features = _clip().flatten(0, 1)
    order = farthest_point(features, 60, strategy=strategy)[0]
    assert farthest_point(features.cuda(), 60, strategy=strategy)[0].tolist() == order.tolist()
    keep = divprune.select_diverse(features, 0.1)[0]
    assert divprune.select_diverse(features.cuda(), 0.1)[0].tolist() == keep.tolist()


@pytest.mark.parametrize("layout", ["flat", "grid"])
def test_holitom(layout: str) -> None:
    features, attention = _clip(), torch.rand(6, 64)
    merged = temporal_merge.outer_merge(features, attention, 0.25, layout=layout)
    on_device = temporal_merge.outer_merge(features.cuda(), attention.cuda(), 0.25, layout=layout)
    assert on_device.source.tolist() == merged.source.tolist()
    torch.testing.assert_close(on_device.features.cpu(), merged.features, rtol=0, atol=1e-5)
    hidden, row = features.flatten(0, 1), torch.rand(384)
    kept, new = temporal_merge.inner_merge(hidden, row, 10, 300)
    kept_device, new_device = temporal_merge.inner_merge(hidden.cuda(), row.cuda(), 10, 300)
    assert kept_device.tolist() == kept.tolist()
    torch.testing.assert_close(new_device.cpu(), new, rtol=0, atol=1e-5)


def test_hiprune() -> None:
    scores = torch.rand(2, 6, 64)
    mask = hiprune.select_hierarchical(*scores, 20, grid_width=8, alpha=0.5)
    assert torch.equal(hiprune.select_hierarchical(*scores.cuda(), 20, grid_width=8, alpha=0.5).cpu(), mask)


def test_attention() -> None:
    q, k = torch.randn(2, 8, 60, 16), torch.randn(2, 2, 60, 16)
    for options in ({}, {"causal": True}, {"segments": [0, 20, 40, 60]}):
        expected = received_attention(q, k, **options)
        torch.testing.assert_close(received_attention(q.cuda(), k.cuda(), **options).cpu(), expected, rtol=0, atol=1e-5)
    expected = last_query_attention(q[:, :, -1:], k)
    torch.testing.assert_close(last_query_attention(q[:, :, -1:].cuda(), k.cuda()).cpu(), expected)
