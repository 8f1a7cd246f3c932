"""One engine for each family, whose method is changed in place, and the transformers path for the same prompts.

Collected only in the environment that ``make test-vllm`` makes; the ordinary tests pass this folder over.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tokensieve.bridges.vllm.arguments import engine_version

if engine_version() is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

HOSTS = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")


@pytest.fixture(scope="package", params=HOSTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The engine and the transformers model of one family."""
    from engine_pair import EnginePair

    made = EnginePair(request.param)
    yield made
    made.close()
    gc.collect()


@pytest.fixture
def same(pair: Any) -> Callable[..., Any]:
    """``same(method, retention, prompts)`` runs both paths and demands equal tokens everywhere."""
    return pair.same  # type: ignore[no-any-return]
