"""``tokensieve demo``: the main job on a clip and a trained model that ship with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import note, out, quiet_transformers
from tokensieve.cli.view import view
from tokensieve.errors import TokensieveError

if TYPE_CHECKING:
    from tokensieve.cli._generate import Answer
    from tokensieve.core.runtime import Run

CLIP, QUESTIONS = "world_clip.mp4", "world_clip.json"


@dataclass(frozen=True)
class Asked:
    """One question with its true answer, answered with all visual tokens and with a part of them."""

    question: str
    truth: str
    full: Answer
    compressed: Answer
    run: Run


def demo(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page and the picture.")] = Path(
        "demo-output"
    ),
    method: options.MethodName = "vidcom2",
    retention: options.Retention = 0.25,
    no_progress: options.NoProgress = False,
) -> None:
    """Ask about a bundled clip with all and with a quarter of the visual tokens, and draw what was kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokensieveError(
            f"The folder {folder} cannot be made ({error.strerror}); choose another with -o."
        ) from error
    data = files("tokensieve") / "data"
    with as_file(data / CLIP) as clip, as_file(data / QUESTIONS) as questions:
        note(
            "the bundled model (4 million parameters, LLaVA-OneVision architecture) was trained on clips like this one "
            "and knows nothing else; see docs/world.md."
        )
        asked = _ask_all(clip, json.loads(questions.read_text()), method, retention, show=not no_progress)
        out.print(_table(asked, method))
        page, picture = folder / "report.html", folder / "report.png"
        view(
            str(clip),
            [page, picture],
            question=asked[0].question,
            model="bundled",
            method=method,
            retention=retention,
            frames=16,
            max_new_tokens=4,
            no_progress=no_progress,
        )
    out.print(Text(f"page:    {page.resolve()}\npicture: {picture.resolve()}"), soft_wrap=True)


def _ask_all(
    clip: Path, questions: list[dict[str, str]], method: str, retention: float | None, show: bool
) -> list[Asked]:
    from tokensieve.cli import _common as common

    methods = common.parse_methods(method, retention)
    with quiet_transformers():
        frames = common.read_frames(str(clip), 16, None, None, None, show)
        loaded = common.open_model("bundled", "float32", "auto", None, False, show)
        found: list[Asked] = []
        for row in questions:
            inputs = common.make_prompt(loaded, frames, row["question"], methods).on(loaded.model)
            if not found:
                # The first call of a process pays for set-up that neither column should carry.
                common.run_methods(loaded, inputs, methods, 1, show)
            full = common.run_plain(loaded, inputs, 4, show)
            compressed, run = common.run_methods(loaded, inputs, methods, 4, show)
            found.append(Asked(row["question"], row["answer"], full, compressed, run))
    return found


def _table(asked: list[Asked], method: str) -> Table:
    from tokensieve.measure.text import in_seconds

    table = Table(show_lines=False)
    table.add_column("question", overflow="fold")
    for name in ("true answer", "full model", method):
        table.add_column(name, overflow="fold")
    for one in asked:
        table.add_row(one.question, one.truth, _marked(one.full, one.truth), _marked(one.compressed, one.truth))
    table.add_section()
    tokens = asked[0].run.report.patches
    table.add_row("visual tokens", "", str(tokens.uncompressed), f"{tokens.last} ({tokens.share('last'):.0%})")
    full = sum(one.full.seconds_to_first_token for one in asked) / len(asked)
    compressed = sum(one.compressed.seconds_to_first_token for one in asked) / len(asked)
    table.add_row("time to first token", "", in_seconds(full), in_seconds(compressed))
    return table


def _marked(answer: Answer, truth: str) -> Text:
    right = answer.text.strip() == truth
    return Text(answer.text.strip(), style="green" if right else "red")
