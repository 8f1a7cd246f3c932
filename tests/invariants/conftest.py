"""The matrix of methods and hosts, and a reference that knows nothing of hooks, ledgers or masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.utils import logging

from tokensieve import list_methods
from tokensieve.hosts import tiny

OPTIONS = {"none": "", "frame-subsample": ":retention=0.5"}
"""How a method is called in the matrix; every registered method takes part, at retention 0.3 unless named here."""
COMPOSITIONS = {
    "vidcom2-exact": "vidcom2:retention=0.3,exact_total=true",
    "fastv-budget": "fastv:retention=0.3,budget=vidcom2",
    "divprune-budget": "divprune:retention=0.3,budget=vidcom2",
    "vidcom2+fastv": "vidcom2:retention=0.4+fastv:retention=0.5",
    "frames+hiprune": "frame-subsample:retention=0.5+hiprune:retention=0.5",
}
METHODS = {name: name + OPTIONS.get(name, ":retention=0.3") for name in list_methods()} | COMPOSITIONS
FAMILIES = list(tiny.FAMILIES)
Loaded = Callable[[str], tuple[Any, Any]]


def load(family: str, **options: Any) -> tuple[Any, Any]:
    """A tiny float32 model in evaluation mode and its processor."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model, processor = tiny.load(family)
    if options:
        model.set_attn_implementation(options["attn"])
    if family == "video_llama_3":
        # Its processor's own pixel-difference pruning would leave ragged frames; one test covers them.
        processor.video_processor.use_token_compression = False
    return model.eval(), processor


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    """Models are loaded once per process and family."""
    cache: dict[str, tuple[Any, Any]] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in cache:
            cache[family] = load(family)
        return cache[family]

    return get


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return METHODS[request.param]
