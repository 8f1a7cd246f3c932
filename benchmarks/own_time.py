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
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.geometry import QWEN2_7B, SIGLIP
from benchmarks.results import RESULTS, SHARED, machine, median, show, write
from benchmarks.stopwatch import throughput, timed
from tokensieve.core.cuts import Cut
from tokensieve.core.layout import Layout
from tokensieve.core.method import Method
from tokensieve.core.plan import Plan, keep_all
from tokensieve.core.registry import list_methods, resolve
from tokensieve.core.sample import DecoderSample, FrameSample, HostFacts, PromptSample, TokenSample
from tokensieve.core.signals import SIGNALS
from tokensieve.errors import MethodError, TokensieveError
from tokensieve.measure.flops import DecoderGeometry, decoder_work, layer_tokens
from tokensieve.measure.text import in_flops, in_percent, in_seconds
from tokensieve.ops.attention import received_attention

__all__ = ["Case", "Decision", "features", "main", "stand_ins"]

TEXT = 61
"""Text tokens of the prompt, newline included."""

FACTS = HostFacts(
    "llava_onevision",
    28,
    26,
    25,
    has_class_token=False,
    tower_pair="siglip",
    text_tower="google/siglip-so400m-patch14-384",
    video_separators="end",
)
GEOMETRY = DecoderGeometry(
    hidden=QWEN2_7B["hidden_size"],
    mlp=QWEN2_7B["intermediate_size"],
    layers=QWEN2_7B["num_hidden_layers"],
    heads=QWEN2_7B["num_attention_heads"],
    kv_heads=QWEN2_7B["num_key_value_heads"],
    head_dim=128,
    vocabulary=QWEN2_7B["vocab_size"],
)
ALL_ROWS = ("encoder.received_attention", "encoder.patch_attention", "encoder.given_attention")
"""Tower signals that need every row of attention; a class token's row or the mean key cost next to nothing."""

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


def stand_ins(requests: Iterable[str], case: Case, patches: int) -> dict[str, Tensor]:
    """Random signals of the declared shapes: attention rows that sum to one, normal values otherwise."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"n": patches, "T": TEXT, "H": GEOMETRY.heads, "D": case.features.shape[1], "n + T": patches + TEXT}
    sizes |= {"F": case.frames, "M": 1, "C": SIGLIP["hidden_size"], "P": SIGLIP["hidden_size"], "B": case.frames}
    found = {}
    for request in requests:
        name = request.partition("@")[0]
        sizes["d"] = 72 if name.startswith("encoder.") else GEOMETRY.kv_heads * GEOMETRY.head_dim
        axes = [axis.strip() for axis in SIGNALS[name].shape.strip("[]").split(",")]
        shape = [int(axis) if axis.isdigit() else sizes[axis] for axis in axes if axis.isdigit() or axis in sizes]
        values = torch.randn(shape, generator=generator)
        if shape == [patches] == [case.layout.patches]:
            found[request] = case.attention
        else:
            found[request] = values.softmax(-1) if "attention" in name else values
    return found


@dataclass
class Decision:
    """One method on one case, with its signals made beforehand, so that only the decision is timed.

    Attributes
    ----------
    layers
        Patches in every decoder layer after `run`.
    """

    method: Method
    case: Case
    layers: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def run(self) -> float:
        """Seconds of every stage of the method together."""
        method, case = self.method, self.case
        if "encoder" in method.stages:
            raise MethodError("it decides while the vision tower runs, which this benchmark does not do")
        self.seconds, total = 0.0, case.layout.patches
        entered, cuts, plan = total, {}, keep_all(total)
        if "frames" in method.stages:
            frames = self._timed(lambda: method.plan_frames(FrameSample(case.frames)))
            entered = total // case.frames * frames.numel()
        if "tokens" in method.stages:
            found = stand_ins(method.signals(FACTS), case, total)
            weight = torch.randn(SIGLIP["hidden_size"], case.features.shape[1])
            tokens = TokenSample(case.features, case.layout, found, FACTS, project=lambda states: states @ weight)
            plan = self._timed(lambda: method.run_tokens(tokens))
            entered = plan.keep.numel()
        memory: dict[str, Any] = {}
        places = method.decoder_cuts(FACTS)
        if places:
            prompt = PromptSample(case.features[:entered], case.features[:TEXT])
            memory = self._timed(lambda: method.read_prompt(prompt))
        present = everything = plan.keep.cpu()[:entered]
        states = case.features[everything] if plan.features is None else plan.features
        for cut in places:
            if cut.restore:
                present, states = everything, case.features[everything]
            if not present.numel() or not method.acts(cut, memory):
                continue
            decided = self._timed(
                partial(method.plan_decoder, self._sample(cut, present, states, entered, memory, plan))
            )
            kept = decided.keep.cpu()
            states = states[kept] if decided.features is None else decided.features
            present = present[kept]
            cuts[cut.first] = present.numel()
        self.layers = layer_tokens(FACTS.decoder_layers, entered, cuts)
        return self.seconds

    def _sample(
        self, cut: Cut, present: Tensor, states: Tensor, entered: int, memory: dict[str, Any], plan: Plan
    ) -> DecoderSample:
        """What the method sees at a cut of the patches that are present, as one item with all text behind it."""
        case, count = self.case, present.numel()
        return DecoderSample(
            hidden=states,
            layer=cut.layer,
            entered=entered,
            view=case.layout.patch_view[present],
            item=torch.zeros(count, dtype=torch.long),
            signals=stand_ins(self.method.decoder_signals(FACTS), case, count),
            memory=memory,
            facts=FACTS,
            uncompressed=torch.tensor([case.layout.patches]),
            cut=cut,
            patch=present,
            cell=present % (case.layout.patches // case.frames),
            text_item=torch.zeros(TEXT, dtype=torch.long),
            infos=[plan.info],
            tower={
                request: value[present]
                for request, value in stand_ins(self.method.signals(FACTS), case, case.layout.patches).items()
                if value.shape[0] == case.layout.patches
            },
        )

    def _timed(self, call: Callable[[], Any]) -> Any:
        found: list[Any] = []
        self.seconds += timed(lambda: found.append(call()), CPU, time.process_time)
        return found[0]


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
    methods = {name: Decision(resolve(name, retention=arguments.retention)[0], case) for name in names}
    passes = {**yardsticks(case), "tower signal: attention received in one layer": tower_signal(case.frames)}
    seconds: dict[str, list[float]] = {name: [] for name in (*passes, *methods)}
    failures: dict[str, str] = {}
    with torch.no_grad():
        for _ in range(2 if arguments.quick else arguments.repeats):
            for name, call in passes.items():
                seconds[name].append(timed(call, CPU, time.process_time))
            for name in [name for name in methods if name not in failures]:
                try:
                    seconds[name].append(methods[name].run())
                except TokensieveError as error:
                    failures[name] = f"{name} is left out: {error}"
        speed = throughput(torch.float32, CPU, clock=time.process_time)
    before = decoder_work(GEOMETRY, [case.layout.patches + TEXT] * GEOMETRY.layers).operations
    unit, signal = (median(seconds[name]) for name in (next(iter(passes)), list(passes)[-1]))
    table = [[name, in_seconds(median(seconds[name])), f"{median(seconds[name]) / unit:.2f}"] for name in passes]
    table = [[*row, "-", "-", "-", "-"] for row in table]
    numbers: dict[str, Any] = {name: {"seconds": median(seconds[name])} for name in passes}
    for name in [name for name in methods if name not in failures]:
        method, layers = methods[name].method, methods[name].layers
        own = median(seconds[name])
        reads = sum(request.partition("@")[0] in ALL_ROWS for request in method.signals(FACTS))
        after = decoder_work(GEOMETRY, [count + TEXT for count in layers]).operations
        saved = (before - after) / speed
        share = sum(layers) / GEOMETRY.layers / case.layout.patches
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
        "tower signals: in how many layers of the vision tower it needs attention to every patch, and what reading "
        "that costs; counted in `own / saved`. Whether this tower has the signal at all is not asked here.",
        "Seconds are processor time of one thread, which other work on the machine hardly changes.",
        f"prefill saved: of a language model of the sizes of Qwen2-7B with {TEXT} text tokens, at "
        f"{speed / 1e9:.0f} GFLOP/s, the matrix throughput of this thread; arithmetic, not a measured prefill.",
    )
    payload = {
        "machine": {**machine(), "dtype": "float32", "matmul_gflops": round(speed / 1e9, 1)},
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "summary": numbers,
        "seconds": seconds,
    }
    path = write(arguments.output, "own_time", payload, title, [("", COLUMNS, table)], (*notes, *failures.values()))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
