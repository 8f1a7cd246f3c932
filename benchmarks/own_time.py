"""What the methods themselves cost: 32 frames of 196 tokens of width 3584, float32, one thread, no model.

    python -m benchmarks.own_time [--quick] [--methods vidcom2 divprune]

Beside every method stand yardsticks measured on the same features (a pass that normalises them and multiplies
them with the centres of the frames, the products inside each frame, those of all pairs, and DivPrune's rule as a
plain loop), the cost of a tower signal where a method reads one, and the prefill of a 7B language model that the
method saves: operations saved, divided by the matrix throughput of the same thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.decisions import CPU, FACTS, GEOMETRY, TEXT, Case, Decision, features, made, stand_ins
from benchmarks.geometry import SIGLIP
from benchmarks.results import RESULTS, SHARED, machine, median, show, write
from benchmarks.stopwatch import throughput, timed
from tokensieve.core.registry import list_methods
from tokensieve.errors import TokensieveError
from tokensieve.measure.flops import decoder_work
from tokensieve.measure.text import in_flops, in_percent, in_seconds
from tokensieve.ops.attention import received_attention
from tokensieve.ops.focus import focused_attention

__all__ = ["Case", "Decision", "features", "main", "plain_divprune", "stand_ins"]

ALL_ROWS = ("encoder.received_attention", "encoder.patch_attention", "encoder.given_attention")
"""Tower signals that need every row of attention; a class token's row or the mean key cost next to nothing."""
FOCUSED = "encoder.focused_attention"

COLUMNS = (
    "method",
    "own time",
    "of VidCom2",
    "of one pass",
    "tower signals",
    "patches per layer",
    "prefill saved",
    "own / saved",
)
BASE = "vidcom2"
AIM = 0.05
LOOP = "DivPrune's rule as a plain loop"


def yardsticks(case: Case) -> dict[str, Callable[[], Any]]:
    """Passes over the same features to compare with; the first is the unit of the table."""
    frames = case.frames

    def one_pass() -> Tensor:
        units = normalize(case.features, dim=1)
        centres = units.view(frames, -1, units.shape[1]).mean(1)
        return units @ centres.T

    def in_frames() -> Tensor:
        units = normalize(case.features, dim=1).view(frames, -1, case.features.shape[1])
        return units @ units.transpose(1, 2)

    def all_pairs() -> Tensor:
        units = normalize(case.features, dim=1)
        return units @ units.T

    return {
        "one pass: normalise, product with frame centres": one_pass,
        "normalise, products inside each frame": in_frames,
        "normalise, products of all pairs": all_pairs,
    }


def plain_divprune(features: Tensor, count: int) -> Tensor:
    """DivPrune's rule word for word: at every step the smallest distance to all chosen tokens, anew.

    Parameters
    ----------
    features : Tensor
        ``[n, D]``.
    count : int
        Tokens to choose.

    Returns
    -------
    Tensor
        ``[count]`` int64 in the order of the choice.
    """
    units = normalize(features, dim=1)
    distances = 1 - units @ units.T
    order = [int(distances.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(order) < count:
        nearest = distances[order].amin(dim=0)
        nearest[order] = float("-inf")
        order.append(int(nearest.argmax()))
    return torch.tensor(order)


def tower_signals(frames: int) -> dict[str, Callable[[], Any]]:
    """Reading attention off the queries and keys of one SigLIP layer, in the two forms that need all rows."""
    heads, tokens = SIGLIP["num_attention_heads"], (SIGLIP["image_size"] // SIGLIP["patch_size"]) ** 2
    q, k = (torch.randn(frames, heads, tokens, SIGLIP["hidden_size"] // heads) for _ in range(2))
    return {
        "tower signal: attention received in one layer": lambda: received_attention(q, k, scale=q.shape[-1] ** -0.5),
        "tower signal: attention received from attended patches": lambda: focused_attention(q, k, 1.0),
    }


def rounds(
    passes: dict[str, Callable[[], Any]], methods: dict[str, Decision], repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Interleaved seconds of every yardstick and method, and the methods that failed with the reason."""
    seconds: dict[str, list[float]] = {name: [] for name in (*passes, *methods)}
    failures: dict[str, str] = {}
    for _ in range(repeats):
        for name, call in passes.items():
            # The loop takes minutes on a busy machine, and once is enough for what is asked of it.
            if name != LOOP or not seconds[name]:
                seconds[name].append(timed(call, CPU, time.process_time))
        for name in [name for name in methods if name not in failures]:
            try:
                seconds[name].append(methods[name].run())
            except TokensieveError as error:
                failures[name] = f"{name} is left out: {error}"
        print(f"round of {len(methods)} methods done", file=sys.stderr, flush=True)
    return seconds, failures


def summary_of(
    decision: Decision, own: float, speed: float, unit: float, signals: Sequence[float]
) -> dict[str, float | int]:
    """Numbers of one method: its own time, the tower signals it reads, and the prefill it saves."""
    method, layers, case = decision.method, decision.layers, decision.case
    names = [request.partition("@")[0] for request in method.signals(FACTS)]
    reads = [sum(name in ALL_ROWS for name in names), names.count(FOCUSED)]
    reading = sum(count * seconds for count, seconds in zip(reads, signals, strict=True))
    before = decoder_work(GEOMETRY, [case.layout.patches + TEXT] * GEOMETRY.layers).operations
    saved = before - decoder_work(GEOMETRY, [count + TEXT for count in layers]).operations
    return {
        "seconds": own,
        "of_one_pass": own / unit,
        "tower_signals": sum(reads),
        "tower_signals_s": reading,
        "patches_per_layer": sum(layers) / GEOMETRY.layers / case.layout.patches,
        "operations_saved": saved,
        "prefill_saved_s": saved / speed,
        "own_of_saved": (own + reading) / (saved / speed) if saved else 0.0,
    }


def row_of(name: str, found: dict[str, float | int], base: float | None) -> list[str]:
    """Table row of one method."""
    cost, reads = found["own_of_saved"], found["tower_signals"]
    saved = f"{in_seconds(found['prefill_saved_s'])} ({in_flops(found['operations_saved'])})"
    return [
        name,
        in_seconds(found["seconds"]),
        f"{found['seconds'] / base:.2f}" if base else "-",
        f"{found['of_one_pass']:.2f}",
        f"{reads} ({in_seconds(found['tower_signals_s'])})" if reads else "-",
        in_percent(found["patches_per_layer"]),
        saved if found["operations_saved"] else "-",
        "-" if not found["operations_saved"] else in_percent(cost) if cost >= 0.001 else "below 0.1 %",
    ]


def notes_of(numbers: dict[str, dict[str, float | int]], speed: float, case: Case) -> list[str]:
    """Sentences under the table."""
    costs = {name: found["own_of_saved"] for name, found in numbers.items() if "own_of_saved" in found}
    notes = [
        SHARED,
        "own time: the decision alone (scores, allocation, selection, merged features), in every stage the method has.",
        "Signals are random numbers of the shapes that a host would give, made beforehand: encoder attention, text "
        "embeddings, attention rows, keys and values. The trained weights of explainability-compression are random "
        "ones of the published size.",
        "tower signals: in how many layers of the vision tower a method needs attention to every patch, and what "
        f"reading that of {case.frames} frames of {(SIGLIP['image_size'] // SIGLIP['patch_size']) ** 2} patches costs; "
        "counted in `own / saved`. Other signals (a class token's row, keys, text towers, attention inside the LLM) "
        "are not timed. Whether this tower has the signal at all is not asked here.",
        f"tome, flowcut: what they do inside of {FACTS.feature_layer + 1} blocks of a tower of SigLIP-so400m's width "
        f"({SIGLIP['num_attention_heads']} heads of 72, states of {SIGLIP['hidden_size']}) over "
        f"{case.layout.patches // case.frames} patches a frame that become tokens without pooling: matching or scoring "
        "on queries, keys and values, then averaging or gathering the states; and their plan in front of the LLM. What "
        "the shorter tower saves is not counted.",
        "Seconds are processor time of one thread, which other work on the machine hardly changes.",
        f"prefill saved: operations of a language model of the sizes of Qwen2-7B with {TEXT} text tokens (two per "
        "multiply-accumulate, attention as the full square) in every layer with all patches, less those with the "
        f"patches that the method leaves there, over {speed / 1e9:.0f} GFLOP/s, the matrix throughput of this thread "
        "in this run; arithmetic, not a measured prefill.",
    ]
    if costs:
        worst = max(costs, key=lambda name: costs[name])
        verdict = "met by all" if costs[worst] <= AIM else "missed by the largest"
        notes.append(
            f"Aim: own time, tower signals included, at most {AIM:.0%} of the prefill saved; {verdict} "
            f"(largest: {worst}, {in_percent(costs[worst])})."
        )
    if LOOP in numbers and "divprune" in numbers:
        factor = numbers[LOOP]["seconds"] / numbers["divprune"]["seconds"]
        notes.append(f"divprune selects {factor:.1f} times faster than its rule as a plain loop (measured once).")
    return notes


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_time", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="methods (default: all)")
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    case = features(arguments.frames, width=arguments.width)
    count = round(arguments.retention * case.layout.patches)
    passes = yardsticks(case) | tower_signals(case.frames) | {LOOP: lambda: plain_divprune(case.features, count)}
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        methods = made(arguments.methods or list_methods(), arguments.retention, case, Path(scratch))
        seconds, failures = rounds(passes, methods, 2 if arguments.quick else arguments.repeats)
        speed = throughput(torch.float32, CPU, clock=time.process_time)
    medians = {name: median(found) for name, found in seconds.items() if found and name not in failures}
    unit, base = medians[next(iter(passes))], medians.get(BASE)
    signals = [medians[name] for name in tower_signals(1)]
    numbers: dict[str, dict[str, float | int]] = {name: {"seconds": medians[name]} for name in passes}
    numbers |= {
        name: summary_of(decision, medians[name], speed, unit, signals)
        for name, decision in methods.items()
        if name in medians
    }
    table = [
        row_of(name, found, base)
        if name in methods
        else [
            name,
            in_seconds(found["seconds"]),
            f"{found['seconds'] / base:.2f}" if base else "-",
            f"{found['seconds'] / unit:.2f}",
            *["-"] * 4,
        ]
        for name, found in numbers.items()
    ]
    title = (
        f"Own time of the methods: {case.frames} frames of {case.layout.patches // case.frames} tokens of width "
        f"{arguments.width}, retention {arguments.retention:g}, float32, one thread"
    )
    show(title, COLUMNS, table)
    notes = [*notes_of(numbers, speed, case), *failures.values()]
    payload = {
        "machine": {**machine(), "dtype": "float32", "matmul_gflops": round(speed / 1e9, 1)},
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "summary": numbers,
        "seconds": seconds,
    }
    path = write(arguments.output, "own_time", payload, title, [("", COLUMNS, table)], notes)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
