"""Top-k inside groups against a plain loop."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.grouped import top_in_groups


def _plain(scores: list[float], group: list[int], counts: list[int]) -> list[int]:
    kept: list[int] = []
    for number, count in enumerate(counts):
        mine = [i for i, owner in enumerate(group) if owner == number]
        kept += sorted(mine, key=lambda i: (-scores[i], i))[:count]
    return sorted(kept)


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_plain_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values make many ties.
    scores = torch.randint(0, 6, (90,), generator=generator).float()
    group = torch.randint(0, 7, (90,), generator=generator)
    counts = torch.randint(0, 25, (8,), generator=generator)
    expected = _plain(scores.tolist(), group.tolist(), counts.tolist())
    assert top_in_groups(scores, group, counts).tolist() == expected


def test_nothing_and_not_a_number() -> None:
    assert top_in_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.tensor([3])).tolist() == []
    scores = torch.tensor([float("nan"), 0.1, 0.3])
    assert top_in_groups(scores, torch.zeros(3, dtype=torch.long), torch.tensor([2])).tolist() == [1, 2]


def test_bad_shapes() -> None:
    with pytest.raises(MethodError, match=r"\(2, 3\)"):
        top_in_groups(torch.zeros(2, 3), torch.zeros(6, dtype=torch.long), torch.tensor([1]))
    with pytest.raises(MethodError, match="group 2 has no count"):
        top_in_groups(torch.zeros(3), torch.arange(3), torch.tensor([1, 1]))
