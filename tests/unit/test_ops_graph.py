"""Connected components against a plain search through the graph."""

from __future__ import annotations

import pytest
import torch

from tokensieve.ops.graph import cosine_matrix, join, matrix_components, similarity_components


def _units(graphs: int, nodes: int, dim: int = 3, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(graphs, nodes, dim, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _plain(
    units: torch.Tensor, threshold: float, sampled: torch.Tensor | None = None
) -> tuple[list[list[int]], list[int]]:
    """Depth-first search, then components in the order of their best connected member."""
    graphs, nodes, _ = units.shape
    found: list[tuple[int, list[int]]] = []
    for graph in range(graphs):
        cosine = (units[graph] @ units[graph].T).tolist()
        links = [[j for j in range(nodes) if j != i and cosine[i][j] > threshold] for i in range(nodes)]
        open_nodes = set(range(nodes))
        while open_nodes:
            component, stack = [], [open_nodes.pop()]
            while stack:
                node = stack.pop()
                component.append(node)
                for other in links[node]:
                    used = sampled is None or bool(sampled[graph, node] or sampled[graph, other])
                    if used and other in open_nodes:
                        open_nodes.remove(other)
                        stack.append(other)
            leader = min(component, key=lambda i: (-len(links[i]), i))
            found.append((graph * nodes + leader, [graph * nodes + i for i in component]))
    found.sort()
    label = [0] * (graphs * nodes)
    for number, (_, component) in enumerate(found):
        for node in component:
            label[node] = number
    return torch.tensor(label).view(graphs, nodes).tolist(), [leader for leader, _ in found]


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 0.995])
@pytest.mark.parametrize("max_pairs", [1, 100, 3000, 10**7])
def test_components_equal_a_search(threshold: float, max_pairs: int) -> None:
    units = _units(3, 40)
    label, leaders = similarity_components(units, threshold, max_pairs=max_pairs)
    assert (label.tolist(), leaders.tolist()) == _plain(units, threshold)
    label, leaders = matrix_components(units @ units.transpose(1, 2), threshold, max_pairs=max_pairs)
    assert (label.tolist(), leaders.tolist()) == _plain(units, threshold)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_sampled_edges(share: float) -> None:
    units = _units(2, 50, seed=1)
    sampled = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)) < share
    label, leaders = similarity_components(units, 0.93, sampled=sampled)
    assert (label.tolist(), leaders.tolist()) == _plain(units, 0.93, sampled)
    if share == 0.0:
        assert leaders.numel() == 100


def test_a_chain_is_one_component() -> None:
    angles = torch.arange(30) * 0.1
    units = torch.stack((angles.cos(), angles.sin()), dim=1)[None]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    label, leaders = similarity_components(units[:, order], 0.99)
    assert label.unique().tolist() == [0]
    ends = {int((order == 0).nonzero()), int((order == 29).nonzero())}
    # Only the two ends of the chain have one link instead of two.
    assert leaders.tolist() == [min(set(range(30)) - ends)]


@pytest.mark.parametrize("seed", range(3))
def test_join_gives_the_lowest_index(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, 60, (2, 40), generator=generator)
    groups = [{i} for i in range(60)]
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        merged = groups[a] | groups[b]
        for i in merged:
            groups[i] = merged
    joined = join(torch.arange(60), first, second)
    assert joined.tolist() == [min(group) for group in groups]
    halves = join(join(torch.arange(60), first[:20], second[:20]), first[20:], second[20:])
    assert torch.equal(halves, joined)


@pytest.mark.parametrize("max_pairs", [1, 120, 10**6])
def test_cosine_matrix(max_pairs: int) -> None:
    units = _units(1, 31, 8)[0]
    cosine = cosine_matrix(units, max_pairs)
    torch.testing.assert_close(cosine, units @ units.T, rtol=0, atol=1e-6)
    assert torch.equal(cosine, cosine.T)
    assert float(cosine.max()) <= 1.0


def test_duplicates_are_not_linked_at_a_threshold_of_one() -> None:
    units = _units(1, 1, 700).expand(1, 20, -1)
    assert similarity_components(units, 1.0)[1].tolist() == list(range(20))
    assert similarity_components(units, 0.9999)[1].tolist() == [0]
