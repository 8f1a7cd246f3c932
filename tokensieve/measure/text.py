"""Reports and quantities as short text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokensieve.measure.report import Change, Report

__all__ = ["in_bytes", "in_flops", "in_percent", "in_seconds", "summary"]


def in_bytes(count: float) -> str:
    """Bytes in decimal units: ``343 MB``."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def in_flops(count: float) -> str:
    """Floating-point operations: ``13.1 TFLOPs``."""
    return _scaled(count, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"))


def in_percent(share: float) -> str:
    """A share as ``24.8 %``."""
    return f"{100 * share:.1f} %"


def in_seconds(seconds: float) -> str:
    """Seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _scaled(count: float, units: Sequence[str]) -> str:
    step = 0
    while abs(count) >= 999.5 and step < len(units) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.3g} {units[step]}"


def summary(report: Report) -> str:
    """A report in a few lines of plain text."""
    asked = "; ".join(
        f"{one.method}, retention {one.retention:g} counted in {one.counted}"
        + ("" if one.dropped is None else f" (drops {one.dropped:g} there)")
        for one in report.requested
    )
    lines = [f"{report.host}: {asked}"]
    if report.prefills == 0:
        return f"{lines[0]}\nno prompt with an image or a video has run yet"
    patches, sequence = report.patches, report.sequence
    prompts = f" in {report.prefills} prefills" if report.prefills > 1 else ""
    lines.append(
        f"patches   {patches.uncompressed} -> {patches.entered} enter the LLM "
        f"({in_percent(patches.share())}){prompts}{_frames(report)}"
    )
    if patches.last != patches.entered:
        lines.append(
            f"inside    {patches.last} behind the last cut ({in_percent(patches.share('last'))}), "
            f"{in_percent(patches.share('average'))} averaged over {report.layers} layers"
        )
    separators = f", {report.separators.after:.0f} separators" if report.separators.before else ""
    lines.append(
        f"sequence  {sequence.uncompressed} -> {sequence.entered} tokens ({in_percent(sequence.share())}), "
        f"{report.text} of text{separators}"
    )
    lines.append(f"work      {_work(report)}")
    if report.cache is not None:
        lines.append(f"cache     {in_bytes(report.cache.before)} -> {in_bytes(report.cache.after)}")
    lines.append(f"time      {_time(report)}")
    lines.append(f"memory    {in_bytes(report.peak_memory)} at the peak ({report.memory_kind})")
    return "\n".join(lines)


def _frames(report: Report) -> str:
    """The spread of patches over frames, where there are frames."""
    counts = [count for item in report.items if item.kind == "video" for count in item.frame_kept]
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    spread = f"{low}" if low == high else f"{low} to {high}"
    return f", {spread} in each of {len(counts)} frames"


def _work(report: Report) -> str:
    parts = [
        f"{name} {_change(change)}"
        for name, change in (("encoder", report.encoder), ("prefill", report.prefill))
        if change is not None
    ]
    return ", ".join(parts) or "not counted for this architecture"


def _change(change: Change) -> str:
    if change.before == change.after:
        return in_flops(change.before)
    return f"{in_flops(change.before)} -> {in_flops(change.after)} ({in_percent(change.ratio)})"


def _time(report: Report) -> str:
    parts = []
    for stage, seconds in report.seconds.items():
        calls = report.calls.get(stage, 0)
        if calls:
            steps = f" in {calls} steps" if stage == "decode" else ""
            parts.append(f"{stage} {in_seconds(seconds)}{steps}")
    return ", ".join(parts) or "not measured"
