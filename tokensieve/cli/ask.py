"""``tokensieve ask``: a question about a video, with compressed visual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import err, note, out, quiet_transformers, show_json
from tokensieve.cli._progress import step
from tokensieve.errors import MethodError

if TYPE_CHECKING:
    from tokensieve.cli._generate import Answer
    from tokensieve.core.method import Method
    from tokensieve.measure.report import Report


def ask(
    video: options.Video,
    question: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
    model: options.Model = None,
    method: options.MethodName = "vidcom2",
    retention: options.Retention = None,
    settings: options.Settings = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also ask the model without compression and show both.")
    ] = False,
    frames: options.Frames = 32,
    fps: options.FramesPerSecond = None,
    start: options.Start = None,
    end: options.End = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")] = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attn: options.Attention = None,
    seed: options.Seed = None,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Ask a question about a video, with the visual tokens compressed by any method."""
    from tokensieve.cli import _common as common

    common.check_question(question)
    if max_new_tokens < 1:
        raise MethodError(f"--max-new-tokens must be 1 or more, not {max_new_tokens}.")
    methods = common.parse_methods(method, retention, settings, seed)
    show = not no_progress
    with quiet_transformers():
        common.check_model(model, methods, trust_remote_code=trust_remote_code)
        clip = common.read_frames(video, frames, fps, start, end, show)
        loaded = common.open_model(model, dtype, device, attn, trust_remote_code, show)
        with step("preparing the frames", show):
            prompt = common.make_prompt(loaded, clip, question, methods)
            inputs = prompt.on(loaded.model)
        if compare:
            # The first call of a process pays for set-up that neither column should carry.
            common.run_methods(loaded, inputs, methods, 1, show)
        compressed, run = common.run_methods(loaded, inputs, methods, max_new_tokens, show)
        full = common.run_plain(loaded, inputs, max_new_tokens, show) if compare else None
    report = run.report
    remarks = common.remarks(report)
    for sentence in remarks:
        note(sentence)
    if as_json:
        show_json(
            {
                "video": video,
                "question": question,
                "model": loaded.name,
                "random_weights": loaded.random_weights,
                "frames": len(clip),
                "timestamps": clip.timestamps.tolist(),
                "methods": common.describe_methods(methods),
                "notes": prompt.notes + remarks + clip.info.warnings,
                "compressed": compressed.to_dict() | _tokens(report),
                "full": None if full is None else full.to_dict() | _tokens(report, full=True),
                "report": report.to_dict(),
            }
        )
    elif full is None:
        out.print(Text(compressed.text), soft_wrap=True)
        err.print(Text(_line(compressed, report), style="dim"), soft_wrap=True)
    else:
        out.print(_table(compressed, full, report, methods))


def _tokens(report: Report, full: bool = False) -> dict[str, Any]:
    """Token counts of one column."""
    visual, prompt = report.patches, report.sequence
    if full:
        return {"visual_tokens": visual.uncompressed, "prompt_tokens": prompt.uncompressed, "share": 1.0}
    return {
        "visual_tokens": visual.entered,
        "visual_tokens_after_last_cut": visual.last,
        "prompt_tokens": prompt.entered,
        "share": visual.share("last"),
    }


def _visual(report: Report) -> str:
    from tokensieve.measure.text import in_percent

    visual = report.patches
    text = f"{visual.entered} ({in_percent(visual.share())})"
    if visual.last != visual.entered:
        text += f", then {visual.last} ({in_percent(visual.share('last'))})"
    return text


def _line(found: Answer, report: Report) -> str:
    """The measurements of a single answer."""
    from tokensieve.measure.text import in_bytes, in_seconds

    parts = [
        f"{report.patches.uncompressed} visual tokens -> {_visual(report)}",
        f"first token after {in_seconds(found.seconds_to_first_token)}",
    ]
    if found.tokens_per_second is not None:
        parts.append(f"{found.tokens_per_second:.1f} tokens/s")
    parts.append(f"{in_bytes(found.peak_memory)} ({found.memory_kind})")
    return " | ".join(parts)


def _table(compressed: Answer, full: Answer, report: Report, methods: list[Method]) -> Table:
    """Both answers side by side."""
    from tokensieve.cli._common import title_of
    from tokensieve.measure.text import in_bytes, in_seconds

    def speed(found: Answer) -> str:
        return "-" if found.tokens_per_second is None else f"{found.tokens_per_second:.1f}"

    def growth(found: Answer) -> str:
        return in_bytes(max(0, found.peak_memory - found.memory_before))

    table = Table(show_lines=False, title_justify="left")
    table.add_column("", style="bold")
    table.add_column("full model", overflow="fold")
    table.add_column(title_of(methods), overflow="fold")
    ratio = full.seconds_to_first_token / compressed.seconds_to_first_token
    table.add_row("answer", Text(full.text), Text(compressed.text))
    table.add_row("visual tokens", str(report.patches.uncompressed), _visual(report))
    table.add_row("prompt tokens", str(report.sequence.uncompressed), str(report.sequence.entered))
    table.add_row(
        "time to first token",
        in_seconds(full.seconds_to_first_token),
        f"{in_seconds(compressed.seconds_to_first_token)} ({ratio:.2f}x as fast)",
    )
    table.add_row("tokens per second", speed(full), speed(compressed))
    table.add_row("peak memory", in_bytes(full.peak_memory), in_bytes(compressed.peak_memory))
    table.add_row("above the idle model", growth(full), growth(compressed))
    table.caption = f"memory: {full.memory_kind}"
    return table
