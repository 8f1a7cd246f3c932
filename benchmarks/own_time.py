"""What the methods themselves cost: 32 frames of 196 tokens of width 3584, float32, one thread, no model.

    python -m benchmarks.own_time [--quick] [--methods vidcom2 divprune]

Beside every method stand yardsticks measured on the same features (a pass that normalises them and multiplies
them with the centres of the frames, the products inside each frame, and those of all pairs), the cost of a
tower signal where a method reads one, and the prefill of a 7B language model that the method saves: operations
saved, divided by the matrix throughput of the same thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.geometry import QWEN2_7B, SIGLIP
from benchmarks.results import RESULTS, SHARED, machine, median, show, write
from benchmarks.stopwatch import throughput, timed
from tokensieve.core.layout import Layout
from tokensieve.core.method import Method
from tokensieve.core.registry import list_methods, resolve
from tokensieve.core.sample import DecoderSample, FrameSample, HostFacts, TokenSample
from tokensieve.measure.flops import DecoderGeometry, decoder_work, layer_tokens
from tokensieve.measure.text import in_flops, in_percent, in_seconds
from tokensieve.ops.attention import received_attention

__all__ = ["Case", "features", "main", "plan"]

TEXT = 61
"""Text tokens of the prompt, newline included."""

FACTS = HostFacts("llava_onevision", 28, 26, 25, has_class_token=False)
GEOMETRY = DecoderGeometry(
    hidden=QWEN2_7B["hidden_size"],
    mlp=QWEN2_7B["intermediate_size"],
    layers=QWEN2_7B["num_hidden_layers"],
    heads=QWEN2_7B["num_attention_heads"],
    kv_heads=QWEN2_7B["num_key_value_heads"],
    head_dim=128,
    vocabulary=QWEN2_7B["vocab_size"],
)
COLUMNS = ("method", "own time", "of one pass", "tower signals", "patches per layer", "prefill saved", "own / saved")
CPU = torch.device("cpu")


@dataclass
class Case:
    """The input that every method gets.

    Attributes
    ----------
    features : Tensor [F * N, D]
        Frame-major.
    layout : Layout
        F square frames.
    attention : Tensor [F * N]
        Stands for any attention signal.
    """

    features: Tensor
    layout: Layout
    attention: Tensor

    @property
    def frames(self) -> int:
        """F."""
        return len(self.layout.views)


def features(frames: int = 32, side: int = 14, width: int = 3584, seed: int = 0) -> Case:
    """Features as video gives them: two scenes, a ground that stays, an object that moves, a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grounds = draw(2, side * side, 24) @ draw(24, width) / 24**0.5 + draw(width)
    found = grounds[(torch.arange(frames) >= frames * 3 // 5).long()].clone()
    found += 0.1 * torch.linspace(0, 1, frames)[:, None, None] * draw(width)
    thing = draw(width) * 1.5
    for frame in range(frames):
        row, column = (frame * 3) % (side - 2), (frame * 5) % (side - 2)
        grid = found[frame].view(side, side, width)
        grid[row : row + 3, column : column + 3] = grid[row : row + 3, column : column + 3] * 0.3 + thing
    found += 0.2 * draw(frames, side * side, width)
    attention = torch.softmax(2 * draw(frames, side * side), -1).flatten()
    return Case(found.flatten(0, 1), Layout.regular("video", frames, side, side), attention)


def plan(method: Method, case: Case) -> list[int]:
    """Run every stage of a method once; returns the patches in every decoder layer."""
    total = case.layout.patches
    entered, cuts = total, {}
    if "frames" in method.stages:
        entered = total // case.frames * method.plan_frames(FrameSample(case.frames)).numel()
    if "tokens" in method.stages:
        signals = dict.fromkeys(method.signals(FACTS), case.attention)
        entered = method.run_tokens(TokenSample(case.features, case.layout, signals, FACTS)).keep.numel()
    present = entered
    for layer in method.decoder_layers(FACTS):
        sample = DecoderSample(
            hidden=case.features[:present],
            signals={"decoder.last_query_attention": case.attention[:present]},
            layer=layer,
            entered=total,
            view=case.layout.patch_view[:present],
            item=torch.zeros(present, dtype=torch.long),
            facts=FACTS,
        )
        present = cuts[layer] = method.plan_decoder(sample).keep.numel()
    return layer_tokens(FACTS.decoder_layers, entered, cuts)


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


def tower_signal(frames: int) -> Callable[[], Any]:
    """Reading the attention received in one SigLIP layer off its queries and keys."""
    heads, tokens = SIGLIP["num_attention_heads"], (SIGLIP["image_size"] // SIGLIP["patch_size"]) ** 2
    q, k = (torch.randn(frames, heads, tokens, SIGLIP["hidden_size"] // heads) for _ in range(2))
    return lambda: received_attention(q, k, scale=q.shape[-1] ** -0.5)


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
    names = arguments.methods or [name for name in list_methods() if name != "none"]
    methods = {name: resolve(name, retention=arguments.retention)[0] for name in names}
    passes = {**yardsticks(case), "tower signal: attention received in one layer": tower_signal(case.frames)}
    seconds: dict[str, list[float]] = {name: [] for name in (*passes, *methods)}
    layers: dict[str, list[int]] = {}

    def decide(name: str) -> None:
        layers[name] = plan(methods[name], case)

    with torch.no_grad():
        for _ in range(2 if arguments.quick else arguments.repeats):
            for name, call in passes.items():
                seconds[name].append(timed(call, CPU))
            for name in methods:
                seconds[name].append(timed(partial(decide, name), CPU))
        speed = throughput(torch.float32, CPU)
    before = decoder_work(GEOMETRY, [case.layout.patches + TEXT] * GEOMETRY.layers).operations
    unit, signal = (median(seconds[name]) for name in (next(iter(passes)), list(passes)[-1]))
    table = [[name, in_seconds(median(seconds[name])), f"{median(seconds[name]) / unit:.2f}"] for name in passes]
    table = [[*row, "-", "-", "-", "-"] for row in table]
    numbers: dict[str, Any] = {name: {"seconds": median(seconds[name])} for name in passes}
    for name, method in methods.items():
        own = median(seconds[name])
        reads = sum(request.startswith("encoder.") for request in method.signals(FACTS))
        after = decoder_work(GEOMETRY, [count + TEXT for count in layers[name]]).operations
        saved = (before - after) / speed
        share = sum(layers[name]) / GEOMETRY.layers / case.layout.patches
        cost = (own + reads * signal) / saved if saved else 0.0
        numbers[name] = {
            "seconds": own,
            "of_one_pass": own / unit,
            "tower_signals": reads,
            "patches_per_layer": share,
            "prefill_saved_s": saved,
            "own_of_saved": cost,
        }
        table.append(
            [
                name,
                in_seconds(own),
                f"{own / unit:.2f}",
                f"{reads} ({in_seconds(reads * signal)})" if reads else "-",
                in_percent(share),
                f"{in_seconds(saved)} ({in_flops(before - after)})",
                in_percent(cost) if cost >= 0.001 else "below 0.1 %",
            ]
        )
    title = (
        f"Own time of the methods: {case.frames} frames of {case.layout.patches // case.frames} tokens of width "
        f"{arguments.width}, retention {arguments.retention:g}, float32, one thread"
    )
    show(title, COLUMNS, table)
    notes = (
        SHARED,
        "own time: the decision alone (scores, allocation, selection, merged features), in every stage the method has.",
        "tower signals: how many layers of the vision tower it reads, and that cost; counted in `own / saved`.",
        f"prefill saved: of a language model of the sizes of Qwen2-7B with {TEXT} text tokens, at "
        f"{speed / 1e9:.0f} GFLOP/s, the matrix throughput of this thread; arithmetic, not a measured prefill.",
    )
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
