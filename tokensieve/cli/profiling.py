"""``tokensieve profile``: where time and memory go, for the full model and for methods side by side."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

import tokensieve
from tokensieve.cli import _options as options
from tokensieve.cli._console import out, quiet_transformers, show_json
from tokensieve.cli._progress import Advance, step
from tokensieve.errors import MethodError

if TYPE_CHECKING:
    from tokensieve.cli._common import Loaded
    from tokensieve.core.method import Method
    from tokensieve.measure.report import Report
    from tokensieve.video import Clip

FULL = "full model"
STAGES = ("encode", "compress", "prefill", "rest", "first token", "each later token")
MEMORY = ("encode", "compress", "prefill", "decode")


@dataclass
class Column:
    """Measurements of one way to run the model.

    Attributes
    ----------
    seconds
        Stage -> one value per repeat.
    memory
        Stage -> most bytes above the idle model, over all repeats.
    report
        Of the last repeat.
    """

    title: str
    methods: list[Method]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    report: Report | None = None

    def median(self, stage: str) -> float | None:
        """Median seconds of a stage."""
        values = self.seconds.get(stage)
        return statistics.median(values) if values else None


def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a model or its name on the hub; a tiny one of random weights unless given.",
            show_default=False,
        ),
    ] = None,
    video: Annotated[
        str | None,
        typer.Argument(help="Video to run on; the clip that comes with tokensieve unless given.", show_default=False),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Methods to compare with the full model, separated by commas.")
    ] = "vidcom2",
    retention: options.Retention = None,
    frames: options.Frames = 32,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to generate in each repeat.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Repeats, of which medians are shown.")] = 3,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attn: options.Attention = None,
    seed: options.Seed = None,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Measure where time and memory go: decoding, encoding, compression, prefill and later tokens."""
    from tokensieve.cli import _common as common

    if new_tokens < 2 or repeats < 1:
        raise MethodError(f"--new-tokens must be 2 or more and --repeats 1 or more, not {new_tokens} and {repeats}.")
    columns = [Column(FULL, common.parse_methods("none"))]
    for name in common.split_methods(methods):
        columns.append(Column(name, common.parse_methods(name, retention, seed=seed)))
    show = not no_progress
    with quiet_transformers():
        common.check_model(model, *(column.methods for column in columns), trust_remote_code=trust_remote_code)
        before: dict[str, float] = {}
        begun = time.perf_counter()
        clip = common.read_frames(video or _bundled_clip(), frames, None, None, None, show)
        before["decode video"] = time.perf_counter() - begun
        loaded = common.open_model(model, dtype, device, attn, trust_remote_code, show)
        begun = time.perf_counter()
        everything = [method for column in columns for method in column.methods]
        prompt = common.make_prompt(loaded, clip, "What happens in this video?", everything)
        before["preprocess"] = time.perf_counter() - begun
        with step("measuring", show, len(columns) * (repeats + 1)) as advance:
            _measure(loaded, prompt.on(loaded.model), columns, new_tokens, repeats, advance)
    found = _summary(loaded, clip, before, columns, repeats)
    if as_json:
        show_json(found)
    else:
        out.print(_table(found))


def _bundled_clip() -> str:
    """Path of the clip that comes with the package: cars on a street, seen from above."""
    return str(Path(tokensieve.__file__).parent / "data" / "overhead_cars.mp4")


def _measure(
    loaded: Loaded, inputs: dict[str, Any], columns: list[Column], new_tokens: int, repeats: int, advance: Advance
) -> None:
    """Run all columns in turn, so that a busy machine slows them alike; the first round is a warm-up."""
    done, total = 0, len(columns) * (repeats + 1)
    for repeat in range(repeats + 1):
        for column in columns:
            _run(loaded, inputs, column, 2 if repeat == 0 else new_tokens, keep=repeat > 0)
            done += 1
            advance(done, total)


def _run(loaded: Loaded, inputs: dict[str, Any], column: Column, new_tokens: int, keep: bool) -> None:
    from tokensieve import compress
    from tokensieve.cli._common import free_memory
    from tokensieve.cli._generate import answer
    from tokensieve.cli._meter import StageMemory

    free_memory()
    with compress(loaded.model, column.methods) as run, StageMemory(run) as meter:
        found = answer(loaded.model, loaded.processor, inputs, new_tokens)
    if not keep:
        return
    column.report = run.report
    seconds = {stage: column.report.seconds.get(stage, 0.0) for stage in ("encode", "compress", "prefill")}
    seconds["rest"] = max(0.0, found.seconds_to_first_token - sum(seconds.values()))
    seconds["first token"] = found.seconds_to_first_token
    if found.tokens_per_second:
        seconds["each later token"] = 1.0 / found.tokens_per_second
    for stage, value in seconds.items():
        column.seconds.setdefault(stage, []).append(value)
    for stage, size in meter.peaks.items():
        column.memory[stage] = max(size, column.memory.get(stage, 0))
    # The meter starts the peak anew at every stage, so the peak of a run is that of its worst stage.
    column.peak = found.memory_before + max(column.memory.values(), default=0)


def _summary(
    loaded: Loaded, clip: Clip, before: dict[str, float], columns: list[Column], repeats: int
) -> dict[str, Any]:
    """Everything measured, as plain data."""
    from tokensieve.cli._common import describe_methods
    from tokensieve.measure.memory import PeakMemory

    model = loaded.model
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "model": loaded.name,
        "random_weights": loaded.random_weights,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "video": clip.info.label,
        "frames": len(clip),
        "repeats": repeats,
        "memory_kind": PeakMemory(model.device).kind,
        "weights_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "seconds_before": before,
        "columns": [
            {
                "title": column.title,
                "methods": describe_methods(column.methods),
                "seconds": {stage: column.median(stage) for stage in STAGES},
                "memory_above_idle": column.memory,
                "peak_memory": column.peak,
                **_counts(column.report),
            }
            for column in columns
        ],
    }


def _counts(report: Report | None) -> dict[str, Any]:
    if report is None:
        return {}
    return {
        "visual_tokens": report.patches.entered,
        "visual_tokens_after_last_cut": report.patches.last,
        "prompt_tokens": report.sequence.entered,
        "cache_bytes": None if report.cache is None else report.cache.after,
    }


def _table(found: dict[str, Any]) -> Table:
    from tokensieve.measure.text import in_bytes, in_seconds

    def seconds(value: float | None) -> str:
        return "-" if value is None else in_seconds(value)

    def size(value: float | None) -> str:
        return "-" if value is None else in_bytes(value)

    columns = found["columns"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    for column in columns:
        table.add_column(column["title"], justify="right")
    for name, value in found["seconds_before"].items():
        table.add_row(name, *([seconds(value)] * len(columns)))
    for stage in STAGES:
        label = "rest until first token" if stage == "rest" else stage
        table.add_row(label, *(seconds(column["seconds"][stage]) for column in columns))
    table.add_section()
    table.add_row("visual tokens", *(_tokens(column) for column in columns))
    table.add_row("prompt tokens", *(str(column["prompt_tokens"]) for column in columns))
    table.add_section()
    table.add_row("weights", *([size(found["weights_bytes"])] * len(columns)))
    table.add_row("cache after prefill", *(size(column["cache_bytes"]) for column in columns))
    for stage in MEMORY:
        table.add_row(f"{stage}, above idle", *(size(column["memory_above_idle"].get(stage)) for column in columns))
    table.add_row("peak memory", *(size(column["peak_memory"]) for column in columns))
    table.caption = (
        f"{found['frames']} frames, {found['device']}, {found['dtype']}, medians of {found['repeats']}; "
        f"memory: {found['memory_kind']}"
    )
    return table


def _tokens(column: dict[str, Any]) -> str:
    entered, last = column["visual_tokens"], column["visual_tokens_after_last_cut"]
    return str(entered) if entered == last else f"{entered}, then {last}"
