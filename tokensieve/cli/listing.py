"""``tokensieve list``: methods, their compositions, hosts and signals, from the metadata of their classes."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import out, show_json
from tokensieve.errors import HostError, MethodError

list_app = typer.Typer(help="List methods, compositions, hosts or signals.", no_args_is_help=True)

Pattern = Annotated[str, typer.Argument(help="Wildcard pattern such as 'vid*'.")]
_ARXIV = "https://arxiv.org/abs/"


@list_app.command("methods")
def list_methods_command(pattern: Pattern = "*", as_json: options.Json = False) -> None:
    """List the compression methods."""
    from tokensieve import list_methods, method_class

    names = list_methods(pattern)
    if not names:
        raise MethodError(f"No method matches {pattern!r}; known are {', '.join(list_methods())}.")
    classes = [method_class(name) for name in names]
    if as_json:
        show_json([_method_facts(cls) for cls in classes])
        return
    rows = (
        (
            cls.name,
            ", ".join(cls.stages),
            cls.kind,
            cls.fidelity,
            cls.venue,
            cls.paper.replace(_ARXIV, "arXiv "),
        )
        for cls in classes
    )
    out.print(_table(("method", "stages", "kind", "fidelity", "venue", "paper"), rows))


@list_app.command("hosts")
def list_hosts_command(pattern: Pattern = "*", as_json: options.Json = False) -> None:
    """List the model families."""
    from tokensieve.hosts import host_class, list_hosts

    names = list_hosts(pattern)
    if not names:
        raise HostError(f"No host matches {pattern!r}; known are {', '.join(list_hosts())}.")
    classes = [host_class(name) for name in names]
    if as_json:
        show_json(
            [
                {
                    "host": cls.slug,
                    "title": cls.title,
                    "model_types": list(cls.model_types),
                    "layout": cls.layout_note,
                    "position_axes": cls.position_axes,
                    "absent_signals": dict(cls.absent),
                }
                for cls in classes
            ]
        )
        return
    rows = ((cls.slug, cls.title, ", ".join(cls.model_types), cls.layout_note) for cls in classes)
    out.print(_table(("host", "title", "model types", "visual tokens"), rows))


@list_app.command("compositions")
def list_compositions_command(
    pattern: Pattern = "*",
    layers: Annotated[int, typer.Option(help="Depth of the LLM; cuts of two methods may fall together.")] = 28,
    refused: Annotated[bool, typer.Option("--refused", help="Those that are refused, with the reason.")] = False,
    as_json: options.Json = False,
) -> None:
    """List which methods act together, and which frame budgets steer which methods."""
    from tokensieve.core.compose import REFERENCE, list_compositions

    facts = dataclasses.replace(REFERENCE, decoder_layers=layers)
    found = [
        composition
        for composition in list_compositions(facts)
        if composition.allowed != refused and fnmatch.fnmatch(composition.notation, pattern)
    ]
    if not found:
        raise MethodError(f"No {'refused' if refused else 'allowed'} composition matches {pattern!r}; try '*fastv*'.")
    if as_json:
        show_json([{**dataclasses.asdict(item), "notation": item.notation} for item in found])
        return
    header = ("composition", "why not") if refused else ("composition", "kind")
    kinds = {True: "frame budget", False: "two methods"}
    out.print(_table(header, ((item.notation, item.reason or kinds[item.budget]) for item in found)))


@list_app.command("signals")
def list_signals_command(as_json: options.Json = False) -> None:
    """List the quantities that methods can ask a model for."""
    from tokensieve.core.signals import SIGNALS

    if as_json:
        show_json([dataclasses.asdict(signal) for signal in SIGNALS.values()])
        return
    rows = ((signal.name, signal.stage, signal.shape, signal.meaning) for signal in SIGNALS.values())
    out.print(_table(("signal", "stage", "shape", "meaning"), rows))


def _method_facts(cls: Any) -> dict[str, Any]:
    """Metadata and options of a method class."""
    facts = ("name", "title", "paper", "venue", "code", "kind", "causal", "exact_count", "fidelity")
    more = ("fidelity_note", "uniform_views", "accepts_budget")
    return {
        **{fact: getattr(cls, fact) for fact in facts + more},
        "stages": list(cls.stages),
        "options": {field.name: _default_of(field) for field in dataclasses.fields(cls)},
    }


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """Default of an option as JSON can hold it."""
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(header):
        table.add_column(
            title, style="bold" if number == 0 else "", no_wrap=number == 0 or title == "paper", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
