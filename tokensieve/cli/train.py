"""``tokensieve train``: train the models that come with tokensieve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import err, out
from tokensieve.cli._progress import step

train_app = typer.Typer(help="Train a model that compresses visual tokens by itself.", no_args_is_help=True)


@train_app.callback()
def _root() -> None:
    """Train a model that compresses visual tokens by itself."""


@train_app.command("ppllava")
def train_ppllava(
    config: Annotated[
        Path,
        typer.Option(
            "--config",
            "-c",
            help="Recipe (YAML), or the name of one that comes with the package; see docs/training-ppllava.md.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder instead of the recipe's.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    check_only: Annotated[bool, typer.Option("--check-only", help="Look at the data and stop.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Field of the recipe; repeat for several.", show_default=False
        ),
    ] = None,
    no_progress: options.NoProgress = False,
) -> None:
    """Train PPLLaVA: stage sft (answers) or dpo (preferred against rejected answers)."""
    from tokensieve.train import read_config

    changes = dict(_setting(pair) for pair in settings or ())
    if output is not None:
        changes["output"] = str(output.resolve())
    recipe = read_config(config, changes)
    if check_only:
        from tokensieve.train.check import load_samples

        with step("looking at the data", not no_progress) as advance:
            _, report = load_samples(recipe.data, recipe.check, recipe.on_broken, lambda done: advance(done, None))
        out.print(Text(str(report)), soft_wrap=True)
        for name, reason in report.broken:
            out.print(Text(f"  {name}: {reason}"), soft_wrap=True)
        return
    from tokensieve.train import train

    result = train(recipe, resume=resume, show_progress=not no_progress and err.is_terminal)
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if result.data is not None:
        out.print(Text(f"data: {result.data}"), soft_wrap=True)
    out.print(_table(result.metrics))
    out.print(Text(f"{result.steps} updates; model: {result.folder}"), soft_wrap=True)


def _setting(pair: str) -> tuple[str, Any]:
    """A field of the recipe as given on the command line."""
    from tokensieve.train.config import TrainingError

    key, equals, value = pair.partition("=")
    if not equals or not key.strip():
        raise TrainingError(f"--set takes field=value, not {pair!r}.")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value.strip()


def _table(rows: list[dict[str, Any]]) -> Table:
    """First and last logged values of every quantity."""
    table = Table("quantity", "first", "last", box=box.SIMPLE_HEAD)
    shown = sorted({name for row in rows for name in row} - {"step", "epoch"}, key=lambda name: (name != "loss", name))
    for name in shown:
        values = [float(row[name]) for row in rows if name in row]
        table.add_row(name, f"{values[0]:.4g}", f"{values[-1]:.4g}")
    return table
