"""VFlowOpt's functions: entropy, recycling against a plain loop, cuts and the constraint on their ratios."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from tokensieve.errors import MethodError, RetentionError
from tokensieve.methods import vflowopt
from tokensieve.ops.merge import apply_merge


def _picture(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, importance, view, row and column of a 9 x 9 base picture and an 8 x 14 mosaic."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.cartesian_prod(torch.tensor([v]), torch.arange(r), torch.arange(c)) for v, r, c in _GRIDS]
    view, row, column = torch.cat(places).unbind(1)
    features = torch.randn(view.numel(), 5, generator=generator)
    return features, torch.rand(view.numel(), generator=generator), view, row, column


_GRIDS = [(0, 9, 9), (1, 8, 14)]


def test_entropy_equals_counting() -> None:
    pixels = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).mul(6).floor() / 6
    entropy = vflowopt.pixel_entropy(pixels, patch=4)
    assert entropy.shape == (2, 1, 2, 3)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                block = (pixels[b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] * 255).int()
                greys = Counter(round(0.3333 * int(value)) for value in block.sum(dim=0).flatten())
                expected = -sum(n / 16 * math.log2(n / 16 + 1e-10) for n in greys.values())
                assert float(entropy[b, 0, i, j]) == pytest.approx(expected, abs=1e-5)


def test_entropy_refuses_normalised_pixels() -> None:
    with pytest.raises(MethodError, match="from 0 to 1"):
        vflowopt.pixel_entropy(torch.full((1, 3, 14, 14), -0.2))
    with pytest.raises(MethodError, match=r"\(1, 3, 15, 14\)"):
        vflowopt.pixel_entropy(torch.zeros(1, 3, 15, 14))


def test_importance_of_an_unreachable_threshold_is_the_received_attention() -> None:
    maps = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    importance = vflowopt.importance_map(maps, 1e6)
    torch.testing.assert_close(importance, maps.mean(dim=(1, 2)))
    with pytest.raises(MethodError, match=r"alpha is 0\.5"):
        vflowopt.importance_map(maps, 2.0, alpha=0.5)


def _plain(
    features: torch.Tensor, importance: list[float], cell: list[int], retention: float, grid: float
) -> dict[int, torch.Tensor]:
    """Survivors and their features, token by token."""
    total = len(importance)
    low = round(total * (1 - retention)) + int(total / grid**2)
    cut = sorted(range(total), key=lambda i: (importance[i], i))[:low]
    out = {i: features[i] for i in range(total) if i not in set(cut)}
    for square in {cell[i] for i in cut}:
        mine = [i for i in cut if cell[i] == square]
        weight = sum(importance[i] for i in mine)
        merged = torch.stack([features[i] * importance[i] for i in mine]).sum(0) / weight
        out[max(mine, key=lambda i: importance[i])] = merged
    return out


@pytest.mark.parametrize(("retention", "grid"), [(0.3, 4.0), (0.1166, 3.39), (0.7, 2.5), (0.5, 30.0), (0.05, 5.7)])
def test_recycling_equals_a_plain_loop(retention: float, grid: float) -> None:
    features, importance, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, grid)
    merged = vflowopt.prune_and_recycle(features, importance, cell, retention, grid)
    expected = _plain(features, importance.tolist(), cell.tolist(), retention, grid)
    assert merged.source.tolist() == sorted(expected)
    for place, rows in zip(merged.source.tolist(), merged.features, strict=True):
        torch.testing.assert_close(rows, expected[place], rtol=1e-5, atol=1e-5)
    again = apply_merge(features, merged.merge_map, merged.source.numel())
    torch.testing.assert_close(again, merged.features, rtol=1e-5, atol=1e-6)
    weights = torch.zeros(merged.source.numel()).index_add(0, merged.merge_map.target, merged.merge_map.weight)
    torch.testing.assert_close(weights, torch.ones_like(weights))


def test_the_size_is_what_the_counts_say() -> None:
    features, importance, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, 4.0)
    merged = vflowopt.prune_and_recycle(features, importance, cell, 0.2, 4.0)
    total = features.shape[0]
    low = round(total * 0.8) + int(total / 16)
    cells = len(set(cell[importance.argsort()[:low]].tolist()))
    assert merged.source.numel() == total - low + cells


def test_views_have_cells_of_their_own() -> None:
    _, _, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, 100.0)
    assert torch.equal(cell, view)
    fractional = vflowopt.grid_cells(view[:81], row[:81], column[:81], 4.5)
    assert int(fractional.max()) == 3
    with pytest.raises(MethodError, match="grid is 0"):
        vflowopt.grid_cells(view, row, column, 0)


def test_keeping_everything() -> None:
    features, importance, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, 100.0)
    merged = vflowopt.prune_and_recycle(features, importance, cell, 1.0, 100.0)
    assert torch.equal(merged.features, features)
    assert vflowopt.select_important(importance, 1.0).tolist() == list(range(importance.numel()))
    # A finer grid recycles its extra tokens even then.
    cell = vflowopt.grid_cells(view, row, column, 5.0)
    fewer = vflowopt.prune_and_recycle(features, importance, cell, 1.0, 5.0)
    assert fewer.source.numel() <= features.shape[0]
    assert not torch.equal(apply_merge(features, fewer.merge_map, fewer.source.numel()), features)


def test_cells_without_importance_take_the_plain_mean() -> None:
    features = torch.arange(8.0).view(4, 2)
    cell = torch.zeros(4, dtype=torch.long)
    merged = vflowopt.prune_and_recycle(features, torch.tensor([0.0, 0.0, 0.0, 1.0]), cell, 0.25, 50.0)
    assert merged.source.tolist() == [0, 3]
    assert merged.features.tolist() == [[2.0, 3.0], [6.0, 7.0]]


def test_video_selection_counts_the_newline() -> None:
    importance = torch.rand(6 * 196, generator=torch.Generator().manual_seed(0))
    keep = vflowopt.select_important(importance, 0.25, separators=1)
    assert keep.numel() == 1177 - round(1177 * 0.75) - 1
    assert set(keep.tolist()) == set(importance.topk(keep.numel()).indices.tolist())
    assert vflowopt.select_important(importance[:4], 0.01, separators=1).tolist() == [int(importance[:4].argmax())]


@pytest.mark.parametrize(("average", "strategy"), vflowopt.STRATEGIES.items())
def test_released_ratios_meet_their_average(average: float, strategy: vflowopt.Strategy) -> None:
    first, second, third = strategy.ratios
    assert vflowopt.average_retention(strategy.ratios, (9, 18), 28) == pytest.approx(average, abs=5e-3)
    solved = vflowopt.last_ratio(average, first, second, (9, 18), 28)
    assert solved == pytest.approx(third, abs=1e-2)
    assert vflowopt.average_retention((first, second, solved), (9, 18), 28) == pytest.approx(average, abs=1e-12)


def test_last_ratio_is_limited() -> None:
    assert vflowopt.last_ratio(0.9, 0.5, 1.0, (9, 18), 28) == 1.0
    with pytest.raises(RetentionError, match=r"0\.1 cannot be reached"):
        vflowopt.last_ratio(0.1, 0.5, 1.0, (9, 18), 28)
