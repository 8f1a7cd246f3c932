"""Errors of the libraries that read checkpoints: which ones to expect, and their first sentence."""

from __future__ import annotations

import re

__all__ = ["brief_error", "library_errors"]


def library_errors() -> tuple[type[Exception], ...]:
    """What transformers raises about a checkpoint that it cannot use."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
        StrictDataclassError,
    )


def brief_error(error: BaseException) -> str:
    """The first sentence of an error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = re.split(r"(?<=[a-z)'\"])\. ", text)[0].rstrip(".")
    return sentence if len(sentence) <= 200 else sentence[:197] + "..."
