"""Given attention against the full attention matrix."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.given import given_attention


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("max_bytes", [1, 3000, 10**8])
@pytest.mark.parametrize("class_index", [0, 22])
def test_equals_the_full_matrix(kv_heads: int, max_bytes: int, class_index: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(2, heads, 23, 8, generator=generator) for heads in (6, kv_heads))
    full = (q @ k.repeat_interleave(6 // kv_heads, dim=1).transpose(-1, -2) * 8**-0.5).softmax(dim=-1).mean(dim=1)
    patches = [i for i in range(23) if i != class_index]
    given = given_attention(q, k, class_index=class_index, max_bytes=max_bytes)
    torch.testing.assert_close(given, full[:, :, patches].mean(dim=2), rtol=0, atol=1e-6)
    scaled = given_attention(q, k, class_index=class_index, scale=0.0)
    torch.testing.assert_close(scaled, torch.full((2, 23), 1 / 23), rtol=0, atol=1e-6)


def test_bad_shapes() -> None:
    with pytest.raises(MethodError, match="1 tokens"):
        given_attention(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    with pytest.raises(MethodError, match="3 query and 2 key heads"):
        given_attention(torch.zeros(1, 3, 5, 4), torch.zeros(1, 2, 5, 4))
