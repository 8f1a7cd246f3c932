"""``tokensieve demo``: the main job on a clip that ships with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import note, out, quiet_transformers
from tokensieve.cli.ask import ask
from tokensieve.cli.view import view
from tokensieve.errors import TokensieveError

QUESTION = "How many cars pass?"


def demo(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page and the picture.")] = Path(
        "demo-output"
    ),
    method: options.MethodName = "vidcom2",
    retention: options.Retention = 0.25,
    no_progress: options.NoProgress = False,
) -> None:
    """Ask about a bundled clip with all and with a quarter of the visual tokens, and draw what was kept."""
    from tokensieve.load import random_weight_model

    note(
        "no trained reference model is bundled yet: a small LLaVA-OneVision of random weights with the token layout "
        "of the published checkpoints runs. Its answers mean nothing; tokens, times and pictures are real."
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokensieveError(
            f"The folder {folder} cannot be made ({error.strerror}); choose another with -o."
        ) from error
    with quiet_transformers():
        model = str(random_weight_model(real_layout=True))
    page, picture = folder / "report.html", folder / "report.png"
    with as_file(files("tokensieve") / "data" / "overhead_cars.mp4") as clip:
        ask(
            str(clip),
            QUESTION,
            model=model,
            method=method,
            retention=retention,
            compare=True,
            max_new_tokens=12,
            no_progress=no_progress,
        )
        view(
            str(clip),
            [page, picture],
            question=QUESTION,
            model=model,
            method=method,
            retention=retention,
            max_new_tokens=12,
            no_progress=no_progress,
        )
    out.print(Text(f"page:    {page.resolve()}\npicture: {picture.resolve()}"), soft_wrap=True)
