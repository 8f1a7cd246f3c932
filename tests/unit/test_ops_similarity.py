"""Unit vectors, cosines, kernels, centres and the patch grid."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.ops.centre import centre_products, channel_variance
from tokensieve.ops.grid import cross_neighbours, insert_after, row_ends, rows_and_columns
from tokensieve.ops.similarity import gaussian_kernel_sum, neighbour_cosine, unit_vectors


def _clip(frames: int = 5, tokens: int = 12, dim: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, tokens, dim, generator=torch.Generator().manual_seed(seed))


def test_unit_vectors_keep_zero() -> None:
    features = _clip()
    features[0, 0] = 0
    units = unit_vectors(features)
    lengths = units.norm(dim=-1).flatten()
    assert float(lengths[0]) == 0.0
    torch.testing.assert_close(lengths[1:], torch.ones(59))
    assert unit_vectors(features.bfloat16()).dtype == torch.float32
    assert unit_vectors(features.double()).dtype == torch.float64


def test_neighbour_cosine_by_definition() -> None:
    features = _clip()
    cosine = neighbour_cosine(features)
    assert cosine.shape == (4, 12)
    for t in range(4):
        for n in range(12):
            a, b = features[t, n].tolist(), features[t + 1, n].tolist()
            expected = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            assert float(cosine[t, n]) == pytest.approx(expected, abs=1e-6)
    assert neighbour_cosine(features[:1]).shape == (0, 12)
    torch.testing.assert_close(neighbour_cosine(features.unsqueeze(0))[0], cosine)


def test_gaussian_kernel_sum_by_definition() -> None:
    squared = torch.tensor([0.0, 0.1, 1.0, 3.9])
    expected = [sum(math.exp(-x / (2 * a)) for a in (0.125, 1.0, 2.0)) for x in squared.tolist()]
    torch.testing.assert_close(gaussian_kernel_sum(squared, (0.125, 1.0, 2.0)), torch.tensor(expected))


def test_channel_variance_survives_a_large_offset() -> None:
    features = _clip(6, 40, 9) + 1000 * torch.arange(9)
    expected = features.double().flatten(0, 1).var(dim=0, correction=0).float()
    torch.testing.assert_close(channel_variance(features), expected, rtol=1e-5, atol=0)
    assert float(channel_variance(torch.full((3, 4, 2), 7.25)).max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [None, [0, 2, 3, 6]])
def test_centre_products_by_definition(dtype: torch.dtype, channels: list[int] | None) -> None:
    features = _clip().to(dtype)
    features[1, 3] = 0
    products = centre_products(features, None if channels is None else torch.tensor(channels))
    chosen = features.double()[..., channels or list(range(7))]
    units = chosen / chosen.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    video, frame = units.mean(dim=(0, 1)), units.mean(dim=1)
    torch.testing.assert_close(products.video_dot.double(), units @ video, rtol=0, atol=1e-6)
    torch.testing.assert_close(products.frame_dot.double(), (units * frame[:, None]).sum(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(products.unit_square.double(), units.square().sum(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(products.video_square.double(), video.square().sum(), rtol=0, atol=1e-6)
    torch.testing.assert_close(products.frame_square[:, 0].double(), frame.square().sum(-1), rtol=0, atol=1e-6)


def test_unselected_channels_have_no_influence() -> None:
    features = _clip()
    loud = features.clone()
    loud[..., 5] = 1e6
    channels = torch.tensor([0, 1, 4])
    for quiet, other in zip(centre_products(features, channels), centre_products(loud, channels), strict=True):
        torch.testing.assert_close(quiet, other)


def test_rows_and_columns() -> None:
    rows, columns = rows_and_columns(torch.tensor([0, 12, 13, 168]), 13)
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 1, 12], [0, 12, 0, 12])


def test_cross_neighbours_wrap_and_clamp() -> None:
    cross = cross_neighbours(torch.tensor([0, 24, 575]), 24, 576)
    assert set(cross[0].tolist()) == {0, 1, 24}
    assert set(cross[1].tolist()) == {24, 23, 25, 0, 48}
    assert set(cross[2].tolist()) == {575, 574, 551}


def test_newlines_follow_rows_that_hold_tokens() -> None:
    # Two frames of 2 x 3 patches; the second row of frame 0 is empty.
    source = torch.tensor([0, 2, 6, 9, 11])
    ends = row_ends(source, tokens_per_frame=6, width=3)
    assert ends.tolist() == [False, True, True, False, True]
    features = torch.arange(5.0).unsqueeze(1)
    out = insert_after(features, ends, torch.tensor([-1.0]))
    assert out[:, 0].tolist() == [0, 1, -1, 2, -1, 3, 4, -1]
