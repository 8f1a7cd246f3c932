"""GPU tests run on demand: on a machine without CUDA every one is skipped and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokensieve.hosts import tiny

Loader = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The first CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none on this machine")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def on_cuda(cuda: torch.device) -> Loader:
    """Tiny models on the device, built once per family, dtype and kernel."""
    built: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def get(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> tuple[Any, Any]:
        key = (family, dtype, attention)
        if key not in built:
            built[key] = tiny.build_in_memory(family, dtype=dtype, device=cuda, attn_implementation=attention)
        return built[key]

    return get
