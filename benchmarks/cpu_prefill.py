"""What compression saves on a CPU: time to first token, decoding, memory, against the full model and the ideal.

    python -m benchmarks.cpu_prefill [--quick] [--memory] [--methods vidcom2 random] [--retention 0.25]

The model has the language model of LLaVA-OneVision-0.5B (24 layers of width 896) and its 32 frames of 196
tokens, with random weights and a narrow vision tower: the language model is what compression shortens. Every
method runs through ``tokensieve.compress`` and ``generate``; the full model is the same call with nothing
attached. The *ideal* is the bare language model, called with as many embeddings as each layer got from the
method: no method can be faster. Runs are interleaved (full, every method, every ideal, and again), and ratios
are medians over medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import tokensieve
from benchmarks.geometry import GEOMETRIES, build, prompt, smoke
from benchmarks.results import RESULTS, SHARED, machine, median, ratio, show, write
from benchmarks.stopwatch import Stopwatch, timed
from tokensieve.core.registry import fitting_methods
from tokensieve.core.runtime import base_model
from tokensieve.hosts.registry import host_for
from tokensieve.measure.from_run import tokens_per_layer
from tokensieve.measure.memory import PeakMemory
from tokensieve.measure.text import in_bytes, in_percent, in_seconds

__all__ = ["main", "measure"]

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
FULL = "full model"
QUICK = ("vidcom2", "holitom", "divprune", "hiprune", "fastv", "random")
GEOMETRY = "llava-onevision-0.5b-narrow-tower"
COLUMNS = (
    "method",
    "patches into LLM",
    "per layer",
    "own time",
    "TTFT of LLM",
    "of full",
    "ideal",
    "over ideal",
    "decode / token",
    "of full",
    "encoder",
    "peak memory",
)
NOTES = (
    SHARED,
    "cpu time, where the title says so: processor time of the process over all its threads (`own time` stays wall "
    "time).",
    "own time: the method and the cutting of the sequence, in front of and inside the language model; reading "
    "attention out of the vision tower is part of `encoder`.",
    "TTFT of LLM: from the call of the language model to its first output, own time included.",
    "ideal: the bare language model with as many embeddings in every layer, nothing attached; `over ideal` is "
    "TTFT over it.",
    "encoder: from `generate` to the language model; the tower is narrow here, so this column says nothing about "
    "real towers except how much a method adds to it or saves.",
    "peak memory: resident set of a fresh process that answers one prompt, and how far that is above the loaded model.",
)


def default_methods(model: Any, quick: bool) -> list[str]:
    """All methods that fit the model; a fixed few for a quick run, however many there are."""
    return list(QUICK) if quick else fitting_methods(host_for(model), base_model(model))


def one_run(
    model: Any, inputs: dict[str, Any], spec: str, retention: float, new_tokens: int, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Times of one ``generate`` call, with a method attached or (``full model``) nothing."""

    def call() -> None:
        model.generate(**inputs, max_new_tokens=new_tokens)

    if spec == FULL:
        with Stopwatch(model, clock) as watch:
            times = watch.run(call)
        return {"first": times.first, "step": times.step, "front": times.front, "own": 0.0}
    options = {} if spec == "none" else {"retention": retention}
    with tokensieve.compress(model, spec, **options) as run, Stopwatch(model, clock) as watch:
        times = watch.run(call)
    report = run.report
    return {
        "first": times.first,
        "step": times.step,
        "front": times.front,
        "own": report.seconds["compress"],
        "layers": tokens_per_layer(run.history[-1], run.facts.decoder_layers)[0][1],
        "patches": report.patches.to_dict(),
    }


def ideal_run(model: Any, length: int, new_tokens: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """The bare language model on some embeddings, then one embedding at a time."""
    text = host_for(model).text_model(base_model(model))
    parameter = next(text.parameters())
    embeds = 0.02 * torch.randn(1, length, text.config.hidden_size).to(parameter)
    with torch.no_grad():
        cache: list[Any] = []
        first = timed(
            lambda: cache.append(text(inputs_embeds=embeds, use_cache=True).past_key_values), parameter.device, clock
        )

        def decode() -> None:
            for _ in range(new_tokens - 1):
                text(inputs_embeds=embeds[:, :1], past_key_values=cache[0], use_cache=True)

        return {"first": first, "step": timed(decode, parameter.device, clock) / max(1, new_tokens - 1)}


def measure(
    model: Any,
    inputs: dict[str, Any],
    specs: Sequence[str],
    retention: float,
    repeats: int,
    new_tokens: int,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, list[dict[str, Any]]], dict[int, list[dict[str, float]]], dict[str, str]]:
    """Interleaved runs of the full model, every method, and the bare language model at every length met.

    Returns
    -------
    runs : dict
        Name -> one record per repeat.
    ideals : dict
        Number of tokens -> one record per repeat.
    failures : dict
        Method -> why it was left out.
    """
    runs: dict[str, list[dict[str, Any]]] = {spec: [] for spec in (FULL, *specs)}
    ideals: dict[int, list[dict[str, float]]] = {}
    failures: dict[str, str] = {}
    ideal_run(model, 64, 2)
    for repeat in range(repeats):
        for spec, found in list(runs.items()):
            try:
                found.append(one_run(model, inputs, spec, retention, new_tokens, clock))
            except tokensieve.TokensieveError as error:
                failures[spec] = f"{spec} failed: {error}"
                del runs[spec]
                continue
            shown = in_seconds(found[-1]["first"])
            print(f"round {repeat + 1} of {repeats}: {spec} {shown}", file=sys.stderr, flush=True)
        for length in sorted({n for found in runs.values() for n in found[-1].get("layers", ())}):
            ideals.setdefault(length, []).append(ideal_run(model, length, new_tokens, clock))
    return runs, ideals, failures


def _ideal(layers: Sequence[int], ideals: dict[int, list[dict[str, float]]], what: str) -> float:
    """Seconds of the bare language model with these tokens in its layers, from the medians per length."""
    return sum(
        share / len(layers) * median(run[what] for run in ideals[length]) for length, share in Counter(layers).items()
    )


def rows(
    runs: dict[str, list[dict[str, Any]]], ideals: dict[int, list[dict[str, float]]], memory: dict[str, dict[str, int]]
) -> tuple[list[list[str]], dict[str, Any]]:
    """Table rows, and the same as numbers."""
    table, numbers = [], {}
    full = {what: [run[what] for run in runs[FULL]] for what in ("first", "step")}
    for spec, found in runs.items():
        mine = {what: [run[what] for run in found] for what in ("first", "step", "front", "own")}
        summary: dict[str, Any] = {f"{what}_s": median(values) for what, values in mine.items()}
        summary["first_of_full"] = ratio(mine["first"], full["first"])
        summary["step_of_full"] = ratio(mine["step"], full["step"])
        entered = per_layer = ideal = over = "-"
        if "layers" in found[-1]:
            patches, layers = found[-1]["patches"], found[-1]["layers"]
            entered, per_layer = str(patches["entered"]), in_percent(patches["average_share"])
            summary |= {"patches": patches, "ideal_first_s": _ideal(layers, ideals, "first")}
            summary["ideal_step_s"] = _ideal(layers, ideals, "step")
            summary["first_over_ideal"] = summary["first_s"] / summary["ideal_first_s"]
            ideal, over = in_seconds(summary["ideal_first_s"]), f"{summary['first_over_ideal']:.2f}"
        if spec in memory:
            summary["memory_bytes"] = memory[spec]
        numbers[spec] = summary
        table.append(
            [
                spec,
                entered,
                per_layer,
                in_seconds(summary["own_s"]) if spec != FULL else "-",
                in_seconds(summary["first_s"]),
                in_percent(summary["first_of_full"]),
                ideal,
                over,
                in_seconds(summary["step_s"]),
                in_percent(summary["step_of_full"]),
                in_seconds(summary["front_s"]),
                _memory(memory.get(spec)),
            ]
        )
    return table, numbers


def _memory(found: dict[str, int] | None) -> str:
    if found is None:
        return "not measured"
    return f"{in_bytes(found['peak'])} (+{in_bytes(found['peak'] - found['loaded'])})"


def peak_of(spec: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Peak resident bytes of a fresh process that answers one prompt, and its bytes before that prompt."""
    command = [sys.executable, "-m", "benchmarks.cpu_prefill", "--peak-of", spec, "--dtype", arguments.dtype]
    command += ["--retention", str(arguments.retention), "--threads", str(torch.get_num_threads())]
    command += ["--smoke"] if arguments.smoke else []
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_prefill", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="methods (default: all that fit the model)")
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: processor time, for a machine that others use too"
    )
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in fresh processes")
    parser.add_argument("--quick", action="store_true", help=f"one round of {', '.join(QUICK)}")
    parser.add_argument("--smoke", action="store_true", help="a miniature model: checks the script, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    geometry = smoke(GEOMETRIES[GEOMETRY]) if arguments.smoke else GEOMETRIES[GEOMETRY]
    model = build(geometry, "cpu", getattr(torch, arguments.dtype))
    inputs = prompt(geometry, model)
    if arguments.peak_of:
        memory = PeakMemory(torch.device("cpu"))
        memory.start()
        loaded = memory.read()
        one_run(model, inputs, arguments.peak_of, arguments.retention, 2)
        print(json.dumps({"peak": memory.read(), "loaded": loaded}))
        return 0
    specs = arguments.methods or default_methods(model, arguments.quick)
    repeats = 1 if arguments.quick else arguments.repeats
    clock = CLOCKS[arguments.clock]
    runs, ideals, failures = measure(model, inputs, specs, arguments.retention, repeats, arguments.new_tokens, clock)
    del model
    memory_of = {spec: peak_of(spec, arguments) for spec in runs} if arguments.memory else {}
    table, numbers = rows(runs, ideals, memory_of)
    threads = torch.get_num_threads()
    title = (
        f"CPU prefill: Qwen2-0.5B language model, {geometry.frames} frames, {geometry.video_tokens} video tokens, "
        f"retention {arguments.retention:g}, {arguments.dtype}, {threads} {'thread' if threads == 1 else 'threads'}, "
        f"{arguments.clock} time, {repeats} rounds"
    )
    show(title, COLUMNS, table)
    payload = {
        "machine": {**machine(), "dtype": arguments.dtype},
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("output", "peak_of")},
        "summary": numbers,
        "runs": runs,
        "ideals": ideals,
    }
    path = write(arguments.output, "cpu_prefill", payload, title, [("", COLUMNS, table)], (*NOTES, *failures.values()))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
