"""tokensieve: compress the visual tokens of Hugging Face video LLMs with any published method, in one line.

with tokensieve.compress(model, "vidcom2", retention=0.25) as run:
    out = model.generate(**inputs)
print(run.report)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tokensieve.core.compose import list_compositions
from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Selector
from tokensieve.core.plan import MergeMap, Plan
from tokensieve.core.registry import MethodLike, list_methods, method_class, resolve
from tokensieve.core.registry import register as register_method
from tokensieve.core.runtime import Run, attached
from tokensieve.core.sample import DecoderSample, FrameSample, TokenSample
from tokensieve.errors import TokensieveError
from tokensieve.hosts.registry import host_for, list_hosts

__version__ = "0.1.0"

__all__ = [
    "DecoderSample",
    "FrameSample",
    "Layout",
    "MergeMap",
    "Method",
    "Plan",
    "Run",
    "Selector",
    "TokenSample",
    "TokensieveError",
    "attach",
    "compress",
    "detach",
    "list_compositions",
    "list_hosts",
    "list_methods",
    "method_class",
    "register_method",
]


def compress(model: nn.Module, method: MethodLike = "vidcom2", **options: Any) -> Run:
    """Prepare a method on a model; use the result in a ``with`` statement.

    Parameters
    ----------
    model
        A Hugging Face video or image LLM (see `list_hosts`).
    method
        A name (``"vidcom2"``), a name with options (``"fastv:layer=3"``), a composition over stages
        (``"vidcom2+fastv"``), a `Method` object, or a list of these.
    **options
        Options of the methods given by name, above all ``retention`` in (0, 1].

    Returns
    -------
    Run
        Attaches on entering a ``with`` block and detaches on leaving it; holds the report.

    Raises
    ------
    TokensieveError
        Unknown method or option, retention outside (0, 1], a model that is not supported, or a method that
        needs a signal which the model cannot give.
    """
    return Run(model, host_for(model), resolve(method, **options))


def attach(model: nn.Module, method: MethodLike = "vidcom2", **options: Any) -> Run:
    """Attach a method until `detach` is called; arguments and errors as `compress`."""
    return compress(model, method, **options).attach()


def detach(model: nn.Module) -> None:
    """Remove whatever is attached to a model and leave it as it was; harmless when nothing is."""
    run = attached(model)
    if run is not None:
        run.detach()
