"""Tiny checkpoints that are loaded once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from tokensieve.hosts import tiny

Loader = Callable[[str], tuple[PreTrainedModel, ProcessorMixin]]


@pytest.fixture(scope="session")
def tiny_host() -> Loader:
    """Give the shared model and processor of a family; tests must leave both as they found them."""
    loaded: dict[str, tuple[PreTrainedModel, ProcessorMixin]] = {}
    logging.disable_progress_bar()
    torch.set_num_threads(1)

    def host(family: str) -> tuple[PreTrainedModel, ProcessorMixin]:
        if family not in loaded:
            loaded[family] = tiny.load(family)
        return loaded[family]

    return host
