"""Attention from attended tokens: chunks against full maps, and against a plain loop."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.attention import received_attention
from tokensieve.ops.focus import focus_mask, focused_attention, focused_mean


def _queries_keys(tokens: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 3, 4, tokens, 8, generator=generator).unbind()
    # A shared direction makes some tokens attract all queries, as encoders do.
    return q + 0.7, k + 2 * torch.randn(3, 1, tokens, 1, generator=generator)


def _maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.5, 1e6])
def test_equals_a_plain_loop(threshold: float) -> None:
    maps = _maps(*_queries_keys())
    focused = focused_mean(maps, threshold)
    for b, attention in enumerate(maps.tolist()):
        size = len(attention)
        received = [sum(row[j] for row in attention) / size for j in range(size)]
        important = [i for i in range(size) if received[i] > threshold * sum(received) / size] or list(range(size))
        expected = [sum(attention[i][j] for i in important) / len(important) for j in range(size)]
        torch.testing.assert_close(focused[b], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_bytes", [1, 64 * 1024 * 1024])
def test_chunks_equal_the_full_map(max_bytes: int) -> None:
    q, k = _queries_keys()
    for threshold in (0.0, 1.5, 3.0, 1e6):
        chunked = focused_attention(q, k, threshold, max_bytes=max_bytes)
        torch.testing.assert_close(chunked, focused_mean(_maps(q, k), threshold), rtol=0, atol=1e-6)


def test_without_threshold_it_is_the_received_attention() -> None:
    q, k = _queries_keys()
    torch.testing.assert_close(focused_attention(q, k, 0.0), received_attention(q, k))


def test_rows_without_an_attended_token_take_all() -> None:
    received = torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0]])
    assert focus_mask(received, 2.0).tolist() == [[True] * 4, [True, False, False, False]]
    with pytest.raises(MethodError, match="threshold is -1"):
        focus_mask(received, -1.0)
