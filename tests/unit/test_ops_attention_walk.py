"""Random walks on attention: definition, grouped heads, keys of earlier turns."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.attention_walk import walk_importance, walk_mass


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _causal(length: int, past: int = 0) -> torch.Tensor:
    return torch.arange(past + length)[None] <= past + torch.arange(length)[:, None]


def test_mass_follows_the_definition() -> None:
    logits = _random(2, 6, 6).masked_fill(~_causal(6), float("-inf"))
    mass = walk_mass(logits, total=9, temperature=0.5, iterations=3)
    for head in range(2):
        step = (logits[head] / 0.5).softmax(-1).tolist()
        expected = [1 / 9] * 6
        for _ in range(3):
            expected = [sum(expected[i] * step[i][j] for i in range(6)) for j in range(6)]
        assert mass[head].tolist() == pytest.approx(expected, rel=1e-4)
    assert walk_mass(logits).sum(-1).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)


def test_heads_that_share_keys() -> None:
    """One head at a time equals all logits at once."""
    q, k = _random(1, 4, 7, 8), _random(1, 2, 7, 8, seed=1)
    mask = _causal(7)
    found = walk_importance(q, k, mask, torch.arange(7), total=7, scale=0.3)
    logits = (q @ k.repeat_interleave(2, 1).transpose(2, 3))[0] * 0.3
    expected = walk_mass(logits.masked_fill(~mask, float("-inf"))).square().mean(0).sqrt()
    torch.testing.assert_close(found, expected)
    in_parts = walk_importance(
        q, k, lambda part: mask[part], torch.arange(7), total=7, scale=0.3, max_bytes=4 * 4 * 7 * 2
    )
    torch.testing.assert_close(in_parts, expected)


def test_mass_that_goes_to_earlier_turns_is_lost() -> None:
    q, k = _random(1, 2, 5, 8), _random(1, 2, 9, 8, seed=1)
    mask, columns = _causal(5, 4), torch.arange(4, 9)
    found = walk_importance(q, k, mask, columns)
    alone = walk_importance(q, k[:, :, 4:], mask[:, 4:], torch.arange(5))
    logits = (q @ k.transpose(2, 3))[0] * 8**-0.5
    mass = walk_mass(logits.masked_fill(~mask, float("-inf")), columns=columns)
    torch.testing.assert_close(found, mass.square().mean(0).sqrt())
    assert float(mass.sum(-1).max()) < 1.0
    assert bool((found <= alone + 1e-6).any()) and not torch.allclose(found, alone)


def test_refused_shapes() -> None:
    for shape in ((6, 6), (2, 6, 5)):
        with pytest.raises(MethodError, match=r"needs logits \[H, L, L\]"):
            walk_mass(torch.zeros(shape))
