"""The greedy determinant against determinants taken one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.determinant import RANK_FLOOR, Strategy, greedy_determinant

STRATEGIES: list[Strategy] = ["matrix", "rows", "auto"]


def _data(batch: int = 3, tokens: int = 40, dim: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64)
    return features, torch.rand(batch, tokens, generator=generator, dtype=torch.float64) + 0.1


def _kernel(features: torch.Tensor, quality: torch.Tensor) -> np.ndarray:
    units = features / features.norm(dim=-1, keepdim=True)
    return (quality[:, None] * (units @ units.T) * quality).numpy()


def _plain(kernel: np.ndarray, count: int) -> list[int]:
    """Every step tries every token and takes the largest determinant."""
    chosen: list[int] = []
    for _ in range(count):
        best = [
            -np.inf if i in chosen else np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1]
            for i in range(len(kernel))
        ]
        chosen.append(int(np.argmax(best)))
    return chosen


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_determinants(strategy: Strategy) -> None:
    features, quality = _data()
    order, gains = greedy_determinant(features, 15, quality, strategy=strategy)
    for b in range(features.shape[0]):
        kernel = _kernel(features[b], quality[b])
        chosen = order[b].tolist()
        assert chosen == _plain(kernel, 15)
        expected = np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1]
        np.testing.assert_allclose(gains[b].log().sum().item(), expected, rtol=1e-9)


def test_sets_are_independent() -> None:
    features, quality = _data()
    together = greedy_determinant(features, 12, quality)[0]
    for b in range(features.shape[0]):
        assert torch.equal(greedy_determinant(features[b], 12, quality[b])[0], together[b])


def test_float32_strategies_agree() -> None:
    features, quality = (x.float() for x in _data(2, 300, 64))
    orders = [greedy_determinant(features, 48, quality, strategy=s)[0] for s in STRATEGIES]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0], greedy_determinant(features, 48, quality, max_matrix_bytes=0)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_behind_the_rank_the_best_quality_follows(strategy: Strategy, dtype: torch.dtype) -> None:
    features = torch.eye(4, dtype=dtype).repeat(5, 1)[None]
    quality = torch.linspace(1.0, 2.0, 20)[None]
    order, gains = greedy_determinant(features, 20, quality, strategy=strategy)
    assert torch.isfinite(gains).all()
    assert sorted(order[0].tolist()) == list(range(20))
    assert order[0, :4].tolist() == [19, 18, 17, 16]
    assert gains[0, 4:].tolist() == [0.0] * 16
    assert order[0, 4:].tolist() == list(range(15, -1, -1))


def test_more_random_tokens_than_dimensions_repeat_nothing() -> None:
    features, quality = (x.float() for x in _data(4, 60, 7))
    order, gains = greedy_determinant(features, 60, quality)
    assert all(sorted(row.tolist()) == list(range(60)) for row in order)
    assert torch.isfinite(gains).all()
    assert bool(((gains >= RANK_FLOOR) | (gains == 0)).all())


def test_ties_zero_tokens_and_lengths() -> None:
    features = torch.zeros(6, 3)
    features[2:5] = torch.eye(3) * 7
    assert greedy_determinant(features, 6)[0].tolist() == [2, 3, 4, 0, 1, 5]
    assert greedy_determinant(features, 99)[0].numel() == 6
    assert greedy_determinant(features, 0)[0].numel() == 0


def test_bad_arguments() -> None:
    features, quality = _data()
    with pytest.raises(MethodError, match=r"\(3, 39\)"):
        greedy_determinant(features, 3, quality[:, :39])
    with pytest.raises(MethodError, match="'lazy' is unknown"):
        greedy_determinant(features, 3, strategy="lazy")  # type: ignore[arg-type]
