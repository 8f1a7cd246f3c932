"""Methods without a model: features as video gives them, random signals, and the stages of one method in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.geometry import QWEN2_7B, SIGLIP
from benchmarks.stopwatch import timed
from benchmarks.tower_work import run_tower
from tokensieve.core.cuts import Cut
from tokensieve.core.layout import Layout
from tokensieve.core.method import Method
from tokensieve.core.plan import Plan, keep_all
from tokensieve.core.registry import method_class, resolve
from tokensieve.core.sample import DecoderSample, FrameSample, HostFacts, PromptSample, TokenSample
from tokensieve.core.signals import SIGNALS
from tokensieve.measure.flops import DecoderGeometry, layer_tokens
from tokensieve.methods.explainability_compression import MapperConfig, RelevanceMapper

__all__ = ["CPU", "FACTS", "GEOMETRY", "TEXT", "Case", "Decision", "features", "made", "stand_ins"]

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
        facts, given = FACTS, {}
        self.seconds, total = 0.0, case.layout.patches
        entered, cuts, plan = total, {}, keep_all(total)
        if "encoder" in method.stages:
            facts = replace(FACTS, patch_tokens=True, has_class_token="tower.class_token" in method.signals(FACTS))
            work = run_tower(method, facts, case.frames, total // case.frames)
            self.seconds, given = work.seconds, {"encoder.groups": work.groups}
        if "frames" in method.stages:
            frames = self._timed(lambda: method.plan_frames(FrameSample(case.frames)))
            entered = total // case.frames * frames.numel()
        if "tokens" in method.stages:
            found = stand_ins(method.signals(facts), case, total) | given
            weight = torch.randn(SIGLIP["hidden_size"], case.features.shape[1])
            tokens = TokenSample(case.features, case.layout, found, facts, project=lambda states: states @ weight)
            plan = self._timed(lambda: method.run_tokens(tokens))
            entered = plan.keep.numel()
        memory: dict[str, Any] = {}
        places = method.decoder_cuts(facts)
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


def made(names: Iterable[str], retention: float, case: Case, folder: Path) -> dict[str, Decision]:
    """Decisions by name; a method that needs trained weights gets random ones of the published size."""
    found = {}
    for name in names:
        cls = method_class(name)
        options: dict[str, Any] = {} if cls.kind == "none" else {"retention": retention}
        if cls.needs_file:
            RelevanceMapper(MapperConfig()).save(folder / name)
            options[cls.needs_file] = str(folder / name)
        found[name] = Decision(resolve(name, **options)[0], case)
    return found
