"""What a user chose for an engine: a method, its options and the pruning rate, as one text that travels with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokensieve.core.method import Method
from tokensieve.core.registry import method_class, option_names, parse
from tokensieve.errors import MethodError

PREFIX = "tokensieve:"
"""In front of every name of ours inside the engine, so that it never means a method of the engine itself."""

ENGINE_METHODS = ("evs", "vidcom2")
"""Names that, without the prefix, mean the engine's own methods."""


@dataclass(frozen=True)
class Choice:
    """A method that prunes every video of an engine.

    Attributes
    ----------
    method
        The same object that runs on transformers.
    text
        Canonical notation with the prefix, ``tokensieve:vidcom2:temperature=0.02``.
    """

    method: Method
    text: str

    @property
    def retention(self) -> float:
        """Share of the tokens of a video that is kept."""
        return self.method.retention

    @property
    def digest(self) -> str:
        """Sixteen characters that differ between methods, options and rates; part of every cache key."""
        options = json.dumps([self.method.name, self.method.options()], sort_keys=True, default=str)
        return hashlib.blake2b(options.encode(), digest_size=8).hexdigest()


def is_ours(name: str | None) -> bool:
    """Whether the value of ``--video-pruning-method`` means a method of tokensieve."""
    return name is not None and name.strip() not in ENGINE_METHODS


def retention_of(rate: float) -> float:
    """Retention of a pruning rate: the decimal number that was meant (0.9 gives 0.1, not 0.09999999999999998)."""
    return round(1.0 - rate, 12)


@lru_cache(maxsize=64)
def read_choice(name: str, rate: float | None) -> Choice:
    """The choice that the engine's two options stand for.

    Parameters
    ----------
    name
        ``divprune``, ``tokensieve:vidcom2`` or ``tokensieve:evs:score_dtype=bfloat16``.
    rate
        ``--video-pruning-rate``: share of the tokens of a video that goes, above 0 and below 1.

    Raises
    ------
    MethodError
        For an unknown name or option, a missing rate, a rate that contradicts the options, or several methods.
    """
    notation = name.strip().removeprefix(PREFIX).strip()
    if rate is None or not 0.0 < rate < 1.0:
        raise MethodError(
            f"The video pruning method {name!r} needs a rate above 0 and below 1, not {rate}; give "
            "--video-pruning-rate, for example 0.75 to keep a quarter."
        )
    if "+" in notation:
        raise MethodError(f"vLLM prunes by one method, not by {notation!r}; name a single one.")
    bare = notation.partition(":")[0].strip()
    defaults: dict[str, Any] = {"retention": retention_of(rate)}
    if "exact_total" in option_names(method_class(bare)):
        # The engine must know the number of tokens before it has seen the video.
        defaults["exact_total"] = True
    method = parse(notation, defaults)[0]
    if abs(method.retention - defaults["retention"]) > 1e-9:
        raise MethodError(
            f"{notation} sets retention={method.retention} but the pruning rate {rate} leaves "
            f"{defaults['retention']}; set the rate only."
        )
    return Choice(method, PREFIX + notation)


def choice_of(multimodal_config: Any) -> Choice | None:
    """The choice that an engine's multimodal configuration carries, None for no method of ours."""
    name = getattr(multimodal_config, "video_pruning_method", None)
    if multimodal_config is None or name is None or not str(name).startswith(PREFIX):
        return None
    return read_choice(str(name), multimodal_config.video_pruning_rate)


def notation(name: str, options: Mapping[str, Any] | None = None) -> str:
    """A method and its options in the one-line notation.

    Raises
    ------
    MethodError
        When a value cannot be written in it (lists, texts with commas).
    """
    parts = []
    for key, value in sorted((options or {}).items()):
        text = value if isinstance(value, str) else json.dumps(value)
        if "," in text or "+" in text:
            raise MethodError(f"The option {key}={value!r} cannot be written in one line; leave it at its default.")
        parts.append(f"{key}={text}")
    return name + (":" + ",".join(parts) if parts else "")
