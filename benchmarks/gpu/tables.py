"""Tables of the GPU benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.cell import FULL, summarise
from tokensieve.measure.text import in_percent, in_seconds

__all__ = ["COLUMNS", "NOTES", "failures", "sections"]

COLUMNS = (
    "method",
    "patches into LLM",
    "per layer",
    "prefill FLOPs",
    "LLM generation",
    "model generation",
    "peak GB",
    "samples/s",
    "TTFT",
    "decode tokens/s",
    "encode",
    "compress",
    "prefill",
    "decode step",
)
NOTES = (
    "Random weights and synthetic clips: speed and memory only, no accuracy. `random` is the ideal: the same number "
    "of tokens for almost no computation.",
    "Every method runs in turn with the full model in the same process; percentages compare medians of that process, "
    "and the full model's row is the median over all processes.",
    "LLM generation (per batch): CUDA events from the first layer of the language model to the end of a two-token "
    "answer; encoder, projector and what a method does in front of the language model are outside. Model generation: "
    "events around the whole `generate`. Peak GB: allocator peak, reset in front of every sample, maximum. Samples/s: "
    "batch over model generation; no video is decoded here.",
    "TTFT: from the call, pixels on the GPU, to the first logits. Decode tokens/s: tokens after the first over the "
    "time after the first, all rows together.",
    "encode: up to the language model, reading of tower signals included. compress: the method and the cutting of the "
    "sequence. prefill: the language model without it. decode step: the language model per later token.",
)


Section = tuple[str, Sequence[str], list[list[str]]]


def failures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Why cells have no figures, one sentence each."""
    return [
        f"{record['method']} on {record['model']}, batch {record['batch']}: {record['error']}"
        for record in records
        if "error" in record
    ]


def sections(records: Sequence[dict[str, Any]]) -> list[Section]:
    """One table per model and batch size."""
    found: list[Section] = []
    for model, batch in dict.fromkeys((record["model"], record["batch"]) for record in records):
        mine = [record for record in records if (record["model"], record["batch"]) == (model, batch)]
        full = [sample for record in mine if "samples" in record for sample in record["samples"][FULL]]
        table = [_row(FULL, summarise(full), None)] if full else []
        for record in mine:
            if "error" in record:
                table.append([record["method"], "failed, see below", *["-"] * (len(COLUMNS) - 2)])
                continue
            samples = record["samples"]
            table.append(_row(record["method"], summarise(samples[record["method"]]), summarise(samples[FULL])))
        found.append((f"{model}, batch {batch}", COLUMNS, table))
    return found


def _row(name: str, mine: dict[str, float], full: dict[str, float] | None) -> list[str]:
    def against(key: str) -> str:
        shown = in_seconds(mine[key])
        return shown if full is None else f"{shown} ({in_percent(mine[key] / full[key])})"

    return [
        name,
        f"{mine['entered']:.0f} ({in_percent(mine['entered_share'])})" if "entered" in mine else "-",
        in_percent(mine["average_share"]) if "average_share" in mine else "-",
        in_percent(mine["flops_ratio"]) if "flops_ratio" in mine else "-",
        against("llm_generation"),
        against("model_generation"),
        f"{mine['peak_bytes'] / 1e9:.1f}",
        f"{mine['samples_per_second']:.2f}",
        against("first_token"),
        f"{mine['decode_tokens_per_second']:.1f}",
        in_seconds(mine["encode"]),
        in_seconds(mine["compress"]) if full is not None else "-",
        in_seconds(mine["prefill"]),
        in_seconds(mine["decode_step"]),
    ]
