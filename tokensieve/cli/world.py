"""``tokensieve world``: make clips with questions, and train the bundled models again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import out
from tokensieve.cli._progress import step
from tokensieve.errors import TokensieveError

world_app = typer.Typer(
    help="Clips with exact questions and answers, and the models trained on them.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="Folder to write to; made when missing.", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="Threads of the training; all cores by default.", show_default=False)]


@world_app.command("make")
def make(
    folder: Folder,
    clips: Annotated[int, typer.Option(help="Number of clips.", min=1)] = 200,
    split: Annotated[str, typer.Option(help="train, validation, test or long.")] = "test",
    frames: Annotated[int | None, typer.Option(help="Frames per clip: 16, or 128 for long clips.", min=8)] = None,
    questions: Annotated[int, typer.Option(help="Questions per clip, each of another family.", min=1)] = 2,
    families: Annotated[
        str | None, typer.Option(help="Question families, separated by commas; all by default.", show_default=False)
    ] = None,
    no_progress: options.NoProgress = False,
) -> None:
    """Write clips as mp4 files and their questions as JSONL, for any video LLM."""
    from tokensieve.world.files import write_world
    from tokensieve.world.words import FAMILIES

    wanted = FAMILIES if families is None else tuple(name.strip() for name in families.split(","))
    length = frames or (128 if split == "long" else 16)
    done = 0
    with step("Writing clips", not no_progress, clips) as advance:

        def on_clip() -> None:
            nonlocal done
            done += 1
            advance(done, clips)

        try:
            target = write_world(folder, split, clips, wanted, per_clip=questions, frames=length, on_clip=on_clip)
        except ValueError as error:
            raise TokensieveError(str(error)) from error
        except OSError as error:
            raise TokensieveError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
    out.print(Text(f"{clips} clips of {length} frames, questions in {target}"), soft_wrap=True)


@world_app.command("train")
def train_command(
    folder: Folder,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    scale: Annotated[
        float, typer.Option(help="Factor on the number of steps; 1 is the bundled model's training.")
    ] = 1.0,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Folder with clip-pair/ and video-llm/ to train further; by default from nothing.", show_default=False
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train the CLIP pair and the video LLM; run it again to go on after an interruption."""
    import torch

    from tokensieve.world.models import CLIP_PAIR, VIDEO_LLM
    from tokensieve.world.training.run import train

    if scale <= 0:
        raise TokensieveError(f"--scale must be positive, got {scale}.")
    if threads is not None:
        torch.set_num_threads(threads)
    missing = [] if start is None else [name for name in (CLIP_PAIR, VIDEO_LLM) if not (start / name).is_dir()]
    if missing:
        raise TokensieveError(f"--start {start} has no folder {missing[0]}; give a folder that holds both models.")
    for stage, record in train(folder, seed, scale, start):
        facts = ", ".join(f"{name} {value:.3f}" for name, value in record.items() if name not in ("step", "seconds"))
        out.print(Text(f"{stage} step {record['step']:.0f} ({record['seconds']:.0f} s): {facts}"), soft_wrap=True)
    out.print(Text(f"Models are in {folder}."), soft_wrap=True)
