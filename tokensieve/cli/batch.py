"""``tokensieve batch``: a question about every video of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import note, out, quiet_transformers, show_json
from tokensieve.cli._progress import step
from tokensieve.errors import MethodError, TokensieveError


def batch(
    source: Annotated[
        str, typer.Argument(help="Folder of videos, or a manifest (.jsonl, .csv, .txt).", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Table to write: .parquet or .jsonl.", show_default=False)
    ],
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Asked about rows without one.", show_default=False)
    ] = None,
    model: options.Model = None,
    method: options.MethodName = "vidcom2",
    retention: Annotated[float, typer.Option("--retention", "-r", help="Share of the visual tokens to keep.")] = 0.25,
    frames: options.Frames = 32,
    fps: options.FramesPerSecond = None,
    max_pixels: Annotated[
        int | None, typer.Option("--max-pixels", help="Scale frames down while decoding.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")] = 64,
    models: Annotated[int, typer.Option("--models", help="Workers with a model each.")] = 1,
    gpus_per_model: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-model", help="GPUs of such a worker, also a fraction; all if there are any.", show_default=False
        ),
    ] = None,
    cpus_per_model: Annotated[float, typer.Option("--cpus-per-model", help="Cores of such a worker.")] = 1.0,
    decoders: Annotated[int, typer.Option("--decoders", help="Workers that read videos, a core each.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Clips answered in one call.")] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Address of a Ray cluster instead of this machine.", show_default=False),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try clips again that failed before.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an earlier run with this output.")] = False,
    dtype: options.Dtype = "auto",
    attn: options.Attention = None,
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Answer a question about every video of a folder or manifest; a run that was killed goes on where it was."""
    if max_new_tokens < 1 or frames < 1:
        raise MethodError(f"--max-new-tokens and --frames must be 1 or more, not {max_new_tokens} and {frames}.")
    from tokensieve.bridges.ray_batch import (
        BatchSettings,
        Journal,
        Workers,
        read_items,
        run_batch,
        write_failed,
        write_table,
    )
    from tokensieve.bridges.ray_batch.table import check_format, failed_path, journal_path
    from tokensieve.cli import _common as common

    output = output.expanduser()
    check_format(output)
    items = read_items(source, question)
    methods = common.parse_methods(method, retention)
    with quiet_transformers():
        folder = _model_folder(model)
        common.check_model(folder, methods)
    settings = BatchSettings(folder, method, retention, frames, fps, max_pixels, max_new_tokens, dtype=dtype, attn=attn)
    workers = Workers(models, decoders, _gpus(gpus_per_model, ray_address), cpus_per_model, batch_size, ray_address)
    if restart:
        journal_path(output).unlink(missing_ok=True)
    with Journal(journal_path(output), settings.to_dict()) as journal:
        left = journal.open_items(items, retry_failed)
        known = len(items) - len(left)
        if known:
            note(f"{known} of {len(items)} clips are finished already.")
        with step("answering", not no_progress, len(items)) as advance:
            advance(known, len(items))
            run_batch(left, settings, workers, journal, lambda done: advance(known + done, len(items)))
        rows = write_table(output, journal.results(items), settings.to_dict())
        failed = write_failed(output, journal.results(items))
    if failed:
        note(f"{failed} of {len(items)} clips failed; {failed_path(output)} lists the reasons.")
    if as_json:
        show_json({"output": str(output), "clips": len(items), "answered": rows, "failed": failed})
    else:
        out.print(Text(f"{rows} answers in {output}"), soft_wrap=True)
    if not rows:
        raise TokensieveError(f"None of the {len(items)} clips could be answered; see {failed_path(output)}.")


def _model_folder(model: str | None) -> str:
    """What the workers load: absolute where it is a folder."""
    if model is None:
        from tokensieve.world.bundled import bundled

        note("no --model was given, so the bundled model answers; it knows only the clips of 'tokensieve world'.")
        return str(bundled())
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _gpus(wanted: float | None, address: str | None) -> float:
    """GPUs of a model: one where this machine has any, unless said otherwise; a cluster is to be told."""
    if wanted is not None:
        return wanted
    import torch

    return 1.0 if address is None and torch.cuda.is_available() else 0.0
