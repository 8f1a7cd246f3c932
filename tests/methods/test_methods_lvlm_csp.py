"""LVLM_CSP: sets of representatives, quotas of objects, counts per layer."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.methods import lvlm_csp
from tokensieve.methods.lvlm_csp import LayerSplit


def test_uniform_set() -> None:
    assert lvlm_csp.uniform_set(576, 144).tolist() == list(range(0, 576, 4))
    assert lvlm_csp.uniform_set(10, 4).tolist() == [0, 2, 4, 6]
    assert lvlm_csp.uniform_set(7, 7).tolist() == list(range(7))
    for count in (0, 8):
        with pytest.raises(MethodError, match=f"cannot choose {count} representatives of 7"):
            lvlm_csp.uniform_set(7, count)


def test_random_set() -> None:
    first = lvlm_csp.random_set(50, 12, torch.Generator().manual_seed(0))
    assert first.unique().numel() == 12 and bool((first.diff() > 0).all())
    assert torch.equal(first, lvlm_csp.random_set(50, 12, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, lvlm_csp.random_set(50, 12, torch.Generator().manual_seed(1)))


def test_class_and_attended_sets() -> None:
    attention = torch.tensor([0.1, 0.5, 0.3, 0.5, 0.2])
    assert lvlm_csp.class_set(attention, 2).tolist() == [1, 3]
    assert lvlm_csp.class_set(attention, 1).tolist() == [1]
    heads = torch.tensor([[0.9, 0.1, 0.0, 0.4], [0.0, 0.1, 0.8, 0.4]])
    assert lvlm_csp.attended_set(heads, 2).tolist() == [0, 2]
    with pytest.raises(MethodError, match="cannot choose 5"):
        lvlm_csp.attended_set(heads, 5)


def test_quotas() -> None:
    assert lvlm_csp.object_quotas(torch.tensor([100, 50, 1]), 16).tolist() == [10, 5, 1]
    assert lvlm_csp.object_quotas(torch.tensor([97, 1, 1, 1]), 2).tolist() == [1, 1, 1, 1]
    with pytest.raises(MethodError, match=r"\[3, 0\]"):
        lvlm_csp.object_quotas(torch.tensor([3, 0]), 2)


def _masks(sizes: list[int], tokens: int) -> torch.Tensor:
    masks, start = torch.zeros(len(sizes), tokens, dtype=torch.bool), 0
    for mask, size in zip(masks, sizes, strict=True):
        mask[start : start + size] = True
        start += size
    return masks


def test_object_set_follows_the_quotas() -> None:
    chosen = lvlm_csp.object_set(_masks([100, 50, 1], 200), 16)
    assert chosen.tolist() == [*range(0, 100, 10), *range(100, 150, 10), 150]


@pytest.mark.parametrize("count", [1, 2, 5, 17, 40])
def test_object_set_has_exactly_as_many(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    overlapping = torch.rand(6, 40, generator=generator) > 0.7
    for masks in (overlapping, _masks([35, 1, 1, 1, 1], 40), torch.zeros(2, 40), torch.zeros(0, 40)):
        chosen = lvlm_csp.object_set(masks, count)
        assert chosen.numel() == count
        assert bool((chosen.diff() > 0).all())
    with pytest.raises(MethodError, match=r"\[O, N\]"):
        lvlm_csp.object_set(torch.zeros(40), count)


def test_small_objects_are_taken_back_first_among_equals() -> None:
    masks = _masks([5, 2, 4], 12)
    assert lvlm_csp.object_set(masks, 2).tolist() == [0, 7]


def test_counts_and_presets() -> None:
    split = lvlm_csp.preset(32, 576)
    assert split == LayerSplit(8, 8, 16, 144, 36)
    assert lvlm_csp.tokens_per_layer(split, 576) == [144] * 8 + [576] * 8 + [36] * 16
    assert lvlm_csp.average_share(split, 576) == pytest.approx(0.34375)
    assert lvlm_csp.preset(32, 576, 70)[:3] == (9, 6, 17)
    assert lvlm_csp.average_share(lvlm_csp.preset(32, 576, 70), 576) == pytest.approx(0.291, abs=1e-3)
    assert lvlm_csp.average_share(LayerSplit(3, 2, 1, 16, 16), 16) == 1.0
    for layers in (3, 4, 28, 40):
        for reduction in (65, 70):
            parts = lvlm_csp.preset(layers, 5, reduction)
            assert sum(parts[:3]) == layers and min(parts) >= 1
    with pytest.raises(MethodError, match="50 %"):
        lvlm_csp.preset(32, 576, 50)
