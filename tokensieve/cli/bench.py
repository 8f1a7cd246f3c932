"""``tokensieve bench``: every method on the same clips and questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import note, out, quiet_transformers, show_json
from tokensieve.cli._progress import step
from tokensieve.errors import BenchError

if TYPE_CHECKING:
    from tokensieve.bench import Results, Row


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder of a model or its name on the hub; the one that comes with tokensieve unless given.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="JSONL file with one question a line; clips made by tokensieve unless given.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Methods separated by commas, in the usual notation, or 'all'.")
    ] = "all",
    retention: Annotated[
        str, typer.Option("--retention", "-r", help="Shares of the visual tokens to keep, separated by commas.")
    ] = "0.25,0.1",
    clips: Annotated[
        int | None,
        typer.Option(
            "--clips", help="Number of clips; 300 made ones or all of a file unless given.", show_default=False
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions",
            help="Questions per clip, spread evenly over the families; 2, or all of a file unless given.",
            show_default=False,
        ),
    ] = None,
    families: Annotated[
        str | None, typer.Option("--families", help="Question families, separated by commas.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Made clips to use: test or long.")] = "test",
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", "-n", help="Frames per clip; 16, or 128 of long clips, unless given.", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            help="open (short free answers) or letters (options are listed); what suits model and data unless given.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for journal and results; an interrupted run goes on there.")
    ] = Path("tokensieve-bench"),
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Processes; one per core for small models on the CPU.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Most questions about a clip that run together.")] = 8,
    text_tower: Annotated[
        str | None,
        typer.Option("--text-tower", help="Text tower for methods that need one.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of clips and of methods that draw.")] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attn: options.Attention = None,
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Compare methods and controls with the full model: accuracy, tokens, time, FLOPs."""
    from tokensieve.bench import BenchConfig, run_bench, write_results
    from tokensieve.cli._common import split_methods

    config = BenchConfig(
        model=model,
        data=None if data is None else str(data),
        methods=tuple(split_methods(methods)),
        retentions=_shares(retention),
        clips=clips,
        questions=questions,
        families=None if families is None else tuple(name.strip() for name in families.split(",") if name.strip()),
        split=split,
        frames=frames,
        prompt=prompt,
        seed=seed,
        dtype=dtype,
        device=device,
        attn=attn,
        batch=batch,
        text_tower=text_tower,
    )
    with quiet_transformers(), step("measuring", not no_progress, 0) as advance:
        results = run_bench(config, folder, workers=workers, progress=advance)
    written = write_results(results, folder)
    if as_json:
        show_json(results.to_dict())
        return
    _show(results)
    note(f"written: {', '.join(map(str, written))}")


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise BenchError(f"--retention takes numbers separated by commas, such as 0.25,0.1, not {text!r}.") from None


def _show(results: Results) -> None:
    from tokensieve.bench.page import claim, ranked, refusals

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("setting", style="bold", no_wrap=True)
    for title in ("right", "kept", "full", "random", "tokens", "layer", "ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for _, rows in ranked(results):
        for row in rows:
            table.add_row(*_cells(row))
        table.add_section()
    facts = results.facts
    table.caption = (
        f"{facts['questions']} questions about {facts['clips']} clips. right, kept: accuracy and share of the full "
        "model's, %. full, random: difference in points, bold when it holds after Holm's correction. tokens: enter the "
        "LLM; layer: share per layer, %. ms: compressor and prefill per question; encoding takes "
        f"{results.full.milliseconds['encode']:.3g} ms per clip."
    )
    out.print(table)
    out.print(Text(". ".join(part for part in claim(results) if part)), soft_wrap=True)
    for reason, settings in refusals(results).items():
        note(f"{', '.join(settings)}: {reason}")


def _cells(row: Row) -> list[Any]:
    spent = row.milliseconds["llm"]
    return [
        Text(row.setting, style="dim" if row.control else ""),
        f"{100 * row.accuracy.value:.1f}",
        "" if row.kept is None else f"{100 * row.kept.value:.1f}",
        _difference(row.against_full),
        _difference(row.against_random),
        f"{row.tokens['entered']:.0f}",
        f"{100 * row.achieved:.1f}",
        f"{spent:.0f}" if spent >= 10 else f"{spent:.1f}",
    ]


def _difference(compared: Any) -> Text:
    from tokensieve.bench.page import verdict

    if compared is None:
        return Text("")
    styles = {"better": "bold green", "worse": "bold red"}
    return Text(f"{100 * compared.difference:+.1f}", style=styles.get(verdict(compared), ""))
