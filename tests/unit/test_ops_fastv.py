"""FastV's ranking and budget arithmetic, and DivPrune's count."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError, RetentionError
from tokensieve.methods import divprune, fastv


def test_rank_visual_ignores_text_and_breaks_ties_low() -> None:
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 0]).bool()
    row = torch.tensor([9.0, 9.0, 0.2, 0.5, 0.2, 9.0, 0.7, 0.2, 9.0])
    assert fastv.rank_visual(row, mask, 3).tolist() == [0, 1, 3]
    assert fastv.rank_visual(row, mask, 5).tolist() == [0, 1, 2, 3, 4]


def test_kept_positions_are_original_and_ascending() -> None:
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 0]).bool()
    positions = fastv.kept_positions(mask, torch.tensor([1, 3]))
    assert positions.tolist() == [0, 1, 3, 5, 6, 8]
    assert mask.tolist() == [False, False, True, True, True, False, True, True, False]


@pytest.mark.parametrize("keep", [0, 4])
def test_rank_visual_limits(keep: int) -> None:
    with pytest.raises(MethodError, match=f"cannot keep {keep} of 3"):
        fastv.rank_visual(torch.rand(5), torch.tensor([1, 1, 1, 0, 0]).bool(), keep)
    with pytest.raises(MethodError, match=r"\(5,\)"):
        fastv.rank_visual(torch.rand(5), torch.ones(4).bool(), 1)


def test_average_over_layers() -> None:
    assert fastv.average_retention(0.5, 2, 28) == pytest.approx((2 + 26 * 0.5) / 28)
    for average in (0.2, 0.5, 1.0):
        retention = fastv.retention_for_average(average, 3, 28)
        assert fastv.average_retention(retention, 3, 28) == pytest.approx(average)
    with pytest.raises(RetentionError, match="3 of 28 layers"):
        fastv.retention_for_average(0.1, 3, 28)


def test_divprune_count_and_order() -> None:
    features = torch.randn(45, 8, generator=torch.Generator().manual_seed(0))
    keep, order, distances = divprune.select_diverse(features, 0.1)
    assert keep.tolist() == sorted(order.tolist())
    assert keep.numel() == distances.numel() == 4
    assert divprune.select_diverse(features, 0.001)[0].numel() == 1
    assert divprune.select_diverse(features, 1.0)[0].tolist() == list(range(45))
    assert divprune.select_diverse(features, 0.1, count=7)[0].numel() == 7
    with pytest.raises(RetentionError):
        divprune.select_diverse(features, 0.0)
