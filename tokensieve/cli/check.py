"""``tokensieve check``: what a model offers and which methods fit it, from its configuration alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import note, out, quiet_transformers, show_json
from tokensieve.cli._progress import step
from tokensieve.errors import TokensieveError


def check(
    model: Annotated[
        str, typer.Argument(help="Folder of a model or its name on the Hugging Face hub.", show_default=False)
    ],
    method: Annotated[
        str | None,
        typer.Argument(help="Method to try: a name, 'name:option=value' or 'a+b'.", show_default=False),
    ] = None,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Tell whether a model is supported and which methods fit it; no weights are loaded.

    The exit code is 2 when METHOD does not fit.
    """
    from tokensieve.cli._common import parse_methods
    from tokensieve.core.runtime import base_model
    from tokensieve.hosts.registry import host_for
    from tokensieve.load import meta_model, read_config

    wanted = None if method is None else parse_methods(method)
    with quiet_transformers():
        with step("reading the configuration", not no_progress):
            built = meta_model(read_config(model, trust_remote_code))
        host, base = host_for(built), base_model(built)
        found: dict[str, Any] = {
            "model": model,
            "model_type": built.config.model_type,
            "host": host.slug,
            "title": host.title,
            "weights": _weights(model),
            "facts": dataclasses.asdict(host.facts(base)),
            "signals": _signals(host, base),
            "methods": _methods(built, host),
        }
        if wanted is not None:
            reason = _reason(built, host, wanted)
            found["asked"] = {"method": method, "fits": reason is None, "reason": reason}
    if as_json:
        show_json(found)
    else:
        _show(found, wanted_only=wanted is not None)
    if wanted is not None and not found["asked"]["fits"]:
        if not as_json:
            raise TokensieveError(found["asked"]["reason"])
        raise typer.Exit(2)


def _weights(model: str) -> str | None:
    """What is wrong with the weight files of a folder; None when nothing is, and for the hub."""
    from tokensieve.load import check_weight_files

    folder = Path(model).expanduser()
    try:
        if folder.is_dir():
            check_weight_files(folder)
    except TokensieveError as error:
        return str(error)
    return None


def _signals(host: Any, base: Any) -> list[dict[str, Any]]:
    """Availability of every signal, and why one is absent."""
    from tokensieve.core.signals import SIGNALS

    found = []
    for name, signal in SIGNALS.items():
        availability = host.availability(name, base)
        why = host.why_absent(name) if availability == "absent" else None
        found.append({"signal": name, "stage": signal.stage, "availability": availability, "why": why})
    return found


def _methods(model: Any, host: Any) -> list[dict[str, Any]]:
    """Every known method with its default options: does it fit, and if not, why."""
    from tokensieve import list_methods, method_class

    found = []
    for name in list_methods():
        method = method_class(name)()
        reason = _reason(model, host, [method])
        found.append({"method": name, "fits": reason is None, "reason": reason})
    return found


def _reason(model: Any, host: Any, methods: list[Any]) -> str | None:
    """Why methods cannot be attached to a model; None when they can."""
    from tokensieve.core.runtime import Run

    try:
        Run(model, host, methods)
    except TokensieveError as error:
        return str(error)
    return None


def _show(found: dict[str, Any], wanted_only: bool) -> None:
    facts = found["facts"]
    if found["weights"] is not None:
        note(found["weights"])
    out.print(
        f"[bold]{escape(found['title'])}[/bold] ({escape(found['model'])}): {facts['decoder_layers']} LLM layers, "
        f"{facts['tower_layers']} encoder layers",
        soft_wrap=True,
    )
    signals = _plain_table("signal", "available", "why not")
    for row in found["signals"]:
        signals.add_row(row["signal"], row["availability"], Text(row["why"] or ""))
    out.print(signals)
    if wanted_only:
        if found["asked"]["fits"]:
            out.print(f"[green]{escape(found['asked']['method'])} fits[/green]")
        return
    methods = _plain_table("method", "fits", "what is missing")
    for row in found["methods"]:
        verdict = Text("yes", "green") if row["fits"] else Text("no", "red")
        methods.add_row(row["method"], verdict, Text(row["reason"] or ""))
    out.print(methods)


def _plain_table(*header: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(header):
        table.add_column(title, style="bold" if number == 0 else "", no_wrap=number < 2, overflow="fold")
    return table
