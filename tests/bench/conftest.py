"""Fixtures of the benchmark's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bench_items import item

from tokensieve.bench.data import Item


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def items() -> list[Item]:
    """Three clips with two questions each."""
    return [item(clip, number) for clip in range(3) for number in range(2)]
