"""The command line: ``tokensieve ask | view | list | check | profile | bench | serve | batch``."""

from __future__ import annotations

from typing import Annotated

import typer

from tokensieve import __version__
from tokensieve.cli._console import out
from tokensieve.cli._group import TokensieveGroup
from tokensieve.cli.ask import ask
from tokensieve.cli.batch import batch
from tokensieve.cli.bench import bench
from tokensieve.cli.check import check
from tokensieve.cli.demo import demo
from tokensieve.cli.listing import list_app
from tokensieve.cli.profiling import profile
from tokensieve.cli.serve import serve
from tokensieve.cli.train import train_app
from tokensieve.cli.tune import tune_app
from tokensieve.cli.view import view
from tokensieve.cli.world import world_app

__all__ = ["app", "main"]

app = typer.Typer(
    cls=TokensieveGroup,
    name="tokensieve",
    help="Visual token compression for Hugging Face video LLMs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"tokensieve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the messages of other libraries.")
    ] = False,
) -> None:
    """Visual token compression for Hugging Face video LLMs."""


app.command("ask")(ask)
app.command("view")(view)
app.add_typer(list_app, name="list")
app.command("check")(check)
app.command("profile")(profile)
app.command("bench")(bench)
app.command("demo")(demo)
app.command("serve")(serve)
app.add_typer(world_app, name="world")
app.command("batch")(batch)
app.add_typer(train_app, name="train")
app.add_typer(tune_app, name="tune")


def main() -> None:
    """Entry point of the ``tokensieve`` command."""
    app()
