"""The KV cache of a call, which transformers has renamed: ``cache`` since 5.24, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

__all__ = ["cache_of", "name_of_cache"]

_NAMES = ("cache", "past_key_values")


def cache_of(holder: Any) -> Any:
    """The cache among the keyword arguments of a layer or model (a mapping), or of a model's output; None without.

    Asking an output for the old name would warn on a release that knows the new one, so that comes first.
    """
    for name in _NAMES:
        found = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
        if found is not None:
            return found
    return None


@lru_cache
def name_of_cache(function: Callable[..., Any]) -> str:
    """What a function of transformers calls its cache."""
    return next((name for name in _NAMES if name in inspect.signature(function).parameters), _NAMES[0])
