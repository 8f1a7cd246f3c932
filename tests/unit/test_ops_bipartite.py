"""Bipartite matching against plain loops, and merging against what a partition promises."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops import bipartite
from tokensieve.ops.bipartite import (
    TokenGroups,
    alternate_match,
    chain_groups,
    identity_groups,
    merge_groups,
    random_match,
    run_match,
    unmerge_groups,
)


def _metric(batch: int = 3, tokens: int = 17, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(seed))


def _loop(metric: torch.Tensor, remove: int, protected: int) -> tuple[list[int], list[int]]:
    """Source of each output and output of each token of one row."""
    tokens = metric.shape[0]
    units = torch.nn.functional.normalize(metric, dim=1)
    remove = max(0, min(remove, (tokens - protected) // 2))
    even, odd = list(range(0, tokens, 2)), list(range(1, tokens, 2))
    if remove == 0:
        return list(range(tokens)), list(range(tokens))
    score, partner = {}, {}
    for a in even:
        allowed = [] if protected and a == 0 else [b for b in odd if not (protected == 2 and b == 1)]
        values = {b: float(units[a] @ units[b]) for b in allowed}
        partner[a] = max(values, key=lambda b, v=values: (v[b], -b)) if values else odd[0]
        score[a] = values[partner[a]] if values else float("-inf")
    ranked = sorted(even, key=lambda a: (-score[a], a))
    merged, left = ranked[:remove], ranked[remove:]
    left = sorted(left) if protected else left
    source = [left[0], odd[0], *left[1:], *odd[1:]] if protected == 2 else left + odd
    group = [source.index(partner[t] if t in merged else t) for t in range(tokens)]
    return source, group


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("remove", [0, 1, 4, 100])
def test_alternate_match_equals_a_loop(protected: int, tokens: int, remove: int) -> None:
    metric = _metric(tokens=tokens, seed=remove)
    groups = alternate_match(metric, remove, class_token=protected > 0, distill_token=protected > 1)
    for row in range(metric.shape[0]):
        source, group = _loop(metric[row], remove, protected)
        assert groups.source[row].tolist() == source
        assert groups.group[row].tolist() == group


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = _metric(tokens=40)
    whole = alternate_match(metric, 12, class_token=True, distill_token=True)
    monkeypatch.setattr(bipartite, "_MAX_BYTES", 1)
    assert all(map(torch.equal, whole, alternate_match(metric, 12, class_token=True, distill_token=True)))


def test_duplicates_merge_first_and_ties_go_to_the_lowest() -> None:
    metric = _metric(1, 12)
    metric[0, 8] = metric[0, 3]
    groups = alternate_match(metric, 1)
    assert groups.group[0, 8] == groups.group[0, 3]
    same = torch.ones(1, 8, 3)
    assert alternate_match(same, 2).source.tolist() == [[4, 6, 1, 3, 5, 7]]
    assert alternate_match(same, 2).group.tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]]
    assert alternate_match(torch.zeros(1, 8, 3), 4).source.tolist() == [[1, 3, 5, 7]]


def test_runs() -> None:
    metric = _metric(tokens=17)
    groups = run_match(metric, 3)
    assert groups.source[0].tolist() == [2, 5, 8, 11, 14]
    units = torch.nn.functional.normalize(metric, dim=2)
    for token in range(15):
        best = (units[1, token] @ units[1, 2:15:3].T).argmax()
        assert groups.group[1, token] == (token // 3 if token % 3 == 2 else best)
    assert torch.equal(run_match(metric, 1).group, identity_groups(3, 17).group)
    half = alternate_match(metric[:, :16], 8)
    assert torch.equal(run_match(metric, 2).group, half.group)
    with pytest.raises(MethodError, match="at least 18"):
        run_match(metric, 18)


def test_random_tokens_join_the_most_similar_that_stay() -> None:
    metric = _metric(tokens=17)
    groups = random_match(metric, 6, torch.Generator().manual_seed(1))
    assert torch.equal(groups.source, random_match(metric, 6, torch.Generator().manual_seed(1)).source)
    units = torch.nn.functional.normalize(metric, dim=2)
    for row in range(3):
        staying = groups.source[row]
        assert bool((staying.diff() > 0).all()) and staying.numel() == 11
        for token in set(range(17)) - set(staying.tolist()):
            assert groups.group[row, token] == (units[row, staying] @ units[row, token]).argmax()
    assert len({tuple(row.tolist()) for row in groups.source}) > 1
    assert random_match(metric, 99).source.shape == (3, 1)
    assert random_match(metric, 0).source.shape == (3, 17)


def test_merging_and_unmerging() -> None:
    metric, values = _metric(), _metric(dim=4, seed=2)
    groups = alternate_match(metric, 7)
    for mode, reduce in (("mean", torch.mean), ("sum", torch.sum), ("amax", torch.amax)):
        merged = merge_groups(values, groups, mode)  # type: ignore[arg-type]
        for row, output in ((0, 0), (1, 9), (2, 5)):
            members = values[row][groups.group[row] == output]
            torch.testing.assert_close(merged[row, output], reduce(members, dim=0))
    back = unmerge_groups(merge_groups(values, groups), groups)
    assert back.shape == values.shape
    alone = torch.nn.functional.one_hot(groups.group, 10).sum(dim=1).gather(1, groups.group) == 1
    assert torch.equal(back[alone], values[alone])
    assert merge_groups(values.half(), groups).dtype == torch.float16
    with pytest.raises(MethodError, match="'median'"):
        merge_groups(values, groups, "median")  # type: ignore[arg-type]


def test_two_matchings_in_a_row() -> None:
    metric = _metric()
    first = alternate_match(metric, 8)
    second = alternate_match(merge_groups(metric, first), 4)
    both = chain_groups(first, second)
    assert both.source.shape == (3, 5)
    for row in range(3):
        for output, token in enumerate(both.source[row].tolist()):
            assert both.group[row, token] == output
    sums = merge_groups(merge_groups(metric, first, "sum"), second, "sum")
    torch.testing.assert_close(merge_groups(metric, both, "sum"), sums)


def test_merging_has_gradients() -> None:
    values = _metric(1, 8).requires_grad_()
    groups = TokenGroups(torch.tensor([[0, 1, 0, 1, 2, 2, 2, 2]]), torch.tensor([[0, 1, 4]]))
    merge_groups(values, groups).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad[0, :, 0], torch.tensor([0.5] * 4 + [0.25] * 4))


def test_bad_shapes() -> None:
    for metric in (torch.zeros(4, 3), torch.zeros(1, 0, 3)):
        with pytest.raises(MethodError, match="matching needs a metric"):
            alternate_match(metric, 1)
