"""Attention statistics against the full attention matrix."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops import attention
from tokensieve.ops.attention import class_attention, last_query_attention, received_attention


def _queries_keys(
    batch: int = 2, heads: int = 6, kv_heads: int = 6, tokens: int = 23, dim: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        2 * torch.randn(batch, heads, tokens, dim, generator=generator),
        2 * torch.randn(batch, kv_heads, tokens, dim, generator=generator),
    )


def _full(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention [B, H, N, N] with repeated key heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(dim=-1)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("chunk", [None, 1, 7, 50])
@pytest.mark.parametrize("reduce_queries", ["mean", "sum"])
def test_received_attention(kv_heads: int, chunk: int | None, reduce_queries: str) -> None:
    q, k = _queries_keys(kv_heads=kv_heads)
    full = _full(q, k)
    expected = full.mean(dim=2) if reduce_queries == "mean" else full.sum(dim=2)
    options = {"queries_per_chunk": chunk, "reduce_queries": reduce_queries}
    if reduce_queries == "sum":
        # Sums over many queries grow with N; the tolerance is meant for probabilities.
        torch.testing.assert_close(received_attention(q, k, **options), expected.mean(dim=1))
    else:
        _close(received_attention(q, k, **options), expected.mean(dim=1))
        _close(received_attention(q, k, reduce_heads=False, **options), expected)


@pytest.mark.parametrize("max_bytes", [1, 20_000, 100_000, 10**9])
def test_result_does_not_depend_on_the_memory_limit(max_bytes: int) -> None:
    q, k = _queries_keys(batch=3)
    segments = torch.tensor([0, 4, 8, 8, 17, 23])
    _close(received_attention(q, k, max_bytes=max_bytes), received_attention(q, k))
    _close(
        received_attention(q, k, segments=segments, max_bytes=max_bytes),
        received_attention(q, k, segments=segments),
    )


def test_logits_stay_below_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = attention._logits

    def spy(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        logits = original(q, k, scale)
        sizes.append(logits.numel() * 4)
        return logits

    monkeypatch.setattr(attention, "_logits", spy)
    q, k = _queries_keys(batch=4, tokens=64)
    for limit in (10_000, 60_000, 400_000):
        sizes.clear()
        received_attention(q, k, max_bytes=limit)
        assert max(sizes) <= limit
        assert sum(sizes) == 4 * 6 * 64 * 64 * 4
    sizes.clear()
    received_attention(q, k, segments=list(range(0, 65, 8)), max_bytes=60_000)
    assert max(sizes) <= 60_000
    assert sum(sizes) == 4 * 6 * 64 * 8 * 4


def test_causal_and_query_rows() -> None:
    q, k = _queries_keys(kv_heads=3)
    allowed = torch.ones(23, 23).tril().bool()
    full = _full(q, k, allowed).mean(dim=1)
    _close(received_attention(q, k, causal=True, queries_per_chunk=5), full.mean(dim=1))
    _close(received_attention(q, k, causal=True, query_rows=slice(10, 20)), full[:, 10:20].mean(dim=1))
    _close(received_attention(q, k, query_rows=slice(-1, None)), _full(q, k).mean(dim=1)[:, -1])
    with pytest.raises(MethodError, match="selects no query"):
        received_attention(q, k, query_rows=slice(5, 5))


def test_causal_with_fewer_queries_than_keys() -> None:
    q, k = _queries_keys()
    allowed = torch.ones(23, 23).tril().bool()
    full = _full(q, k, allowed)[:, :, 16:].mean(dim=(1, 2))
    _close(received_attention(q[:, :, 16:], k, causal=True), full)


@pytest.mark.parametrize("as_list", [False, True])
def test_segments_equal_a_block_diagonal_matrix(as_list: bool) -> None:
    q, k = _queries_keys(kv_heads=2)
    bounds = [0, 4, 8, 8, 17, 21, 23]
    block = torch.bucketize(torch.arange(23), torch.tensor(bounds[1:]), right=True)
    same = block.unsqueeze(0) == block.unsqueeze(1)
    full = _full(q, k, same)
    segments = bounds if as_list else torch.tensor(bounds, dtype=torch.int32)
    lengths = same.sum(dim=0)
    _close(received_attention(q, k, segments=segments), full.sum(dim=2).mean(dim=1) / lengths)
    _close(received_attention(q, k, segments=segments, reduce_queries="sum", reduce_heads=False), full.sum(dim=2))
    _close(received_attention(q, k, segments=[0, 23]), received_attention(q, k))


@pytest.mark.parametrize("bounds", [[0, 5], [1, 23], [0, 9, 4, 23], [], [0]])
def test_malformed_segments(bounds: list[int]) -> None:
    q, k = _queries_keys()
    with pytest.raises(MethodError, match="segment boundaries"):
        received_attention(q, k, segments=bounds)


def test_segments_do_not_combine_with_causal() -> None:
    q, k = _queries_keys()
    with pytest.raises(MethodError, match="query_rows or causal"):
        received_attention(q, k, segments=[0, 23], causal=True)


def test_head_counts_must_divide() -> None:
    q, k = _queries_keys(heads=6, kv_heads=4)
    with pytest.raises(MethodError, match="6 query heads cannot share 4"):
        received_attention(q, k)


def test_received_attention_is_a_distribution_in_half_precision() -> None:
    q, k = _queries_keys()
    received = received_attention(q.bfloat16(), k.bfloat16())
    assert received.dtype == torch.float32
    _close(received.sum(dim=-1), torch.ones(2))
    _close(received, _full(q.bfloat16(), k.bfloat16()).mean(dim=(1, 2)))


@pytest.mark.parametrize("class_index", [0, 22])
def test_class_attention(class_index: int) -> None:
    q, k = _queries_keys(kv_heads=3)
    row = _full(q, k)[:, :, class_index]
    _close(class_attention(q, k, class_index=class_index), row.mean(dim=1))
    _close(class_attention(q, k, class_index=class_index, reduce_heads=False), row)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
def test_last_query_attention_with_padding(mask_dtype: torch.dtype) -> None:
    q, k = _queries_keys(kv_heads=2)
    mask = torch.ones(2, 23, dtype=mask_dtype)
    mask[1, :9] = 0
    result = last_query_attention(q[:, :, -1:], k, mask)
    _close(result[0], _full(q, k)[0, :, -1].mean(dim=0))
    _close(result[1, 9:], _full(q[1:, :, 9:], k[1:, :, 9:])[0, :, -1].mean(dim=0))
    assert float(result[1, :9].abs().max()) == 0.0
    per_head = last_query_attention(q[:, :, -1:], k, scale=1.0, reduce_heads=False)
    _close(per_head, (q[:, :, -1:] @ k.repeat_interleave(3, 1).transpose(-1, -2)).softmax(-1)[:, :, 0])
