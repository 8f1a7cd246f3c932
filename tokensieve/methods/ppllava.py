"""PPLLaVA without training: visual tokens pooled over time and space under the guidance of the question.

Based on "PPLLaVA: Varied Video Sequence Understanding With Prompt Guidance" (arXiv 2411.02327), sections 3.1 and 3.2.
The pair of towers that the host's vision tower was taken from says how well each patch fits the question; a softmax
over all patches of the clip gives the weights of a pooling whose windows slide over frames, rows and columns. The
operator and the trained model with its longer text context are in `tokensieve.models.ppllava`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from tokensieve.core.guided import GuidedMethod
from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Stage
from tokensieve.core.plan import MergeMap, Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.models.ppllava.pooling import (
    IMAGE_KERNEL,
    TEMPERATURE,
    VIDEO_KERNEL,
    Triple,
    Weighting,
    Window,
    prompt_guided_pool,
    resolve_window,
    window_weights,
)
from tokensieve.models.ppllava.relevance import VALUE_SCALE, cosine_map, relevance_map

PUBLISHED = 1 / 18
"""Retention of the published windows for videos; images keep 1/9 with theirs."""

SHAPE_COST, TIME_COST = 1.0, 0.1
"""What a picture out of shape and paired frames weigh against the logarithm of the count (chosen here)."""

ALIGNED = "encoder.aligned@feature"
HEAD_ATTENTION = "encoder.head_attention@feature"
QUESTION = "prompt.question_embedding"
SCALE = "prompt.similarity_scale"


def window_for(size: Triple, retention: float) -> Window:
    """Windows whose number comes close to a share of the patches.

    Every axis is divided so that windows overlap by less than their stride and cover all of it; frames stay single or
    are paired, as in the published windows. Among these grids a number close to the one asked for counts most, then
    the shape of the picture, then frames that stay single.

    Parameters
    ----------
    size : tuple of int
        Frames, rows and columns.
    retention : float
        In (0, 1].

    Returns
    -------
    Window
        For 32 frames of 24 x 24 patches and 1/18 the published one.
    """
    frames, rows, columns = size
    wanted = retention * math.prod(size)
    times = [frames, frames // 2] if frames > 1 else [1]

    def cost(grid: Triple) -> float:
        count = abs(math.log(math.prod(grid) / wanted))
        shape = abs(math.log(grid[1] / grid[2] * columns / rows))
        return count + SHAPE_COST * shape + TIME_COST * (grid[0] < frames)

    grids = itertools.product(times, _divisions(rows), _divisions(columns))
    return resolve_window(size, output_size=min(grids, key=cost))


def _divisions(size: int) -> list[int]:
    """Numbers of windows of an axis that overlap by less than their stride."""
    found = []
    for count in range(1, size + 1):
        stride = size // count
        if size - (count - 1) * stride < 2 * stride:
            found.append(count)
    return found


@register
@dataclass
class PPLLaVA(GuidedMethod):
    """Prompt-guided pooling of the tokens that enter the LLM.

    The patches of an item are pooled together with one relevance map. A pooled token takes the place of the patch in
    the middle of its window.

    Parameters
    ----------
    retention
        The default stands for the published windows, (2, 3, 3) for videos (1/18 of the patches) and (1, 3, 3) for
        images (1/9). Any other value looks for windows that keep that share, see `window_for`.
    kernel
        Window and stride (frames, rows, columns) instead; leftovers at the end of an axis are dropped. For views of
        images the first number is taken as 1.
    weighting
        Weights inside a window: ``"window_softmax"`` of the released code, ``"paper_raw"`` (relevance itself, which
        shrinks the tokens), ``"window_renorm"`` (relevance over its sum; guides more strongly).
    temperature
        Of ``"window_softmax"``. At the published 0.01 most windows are nearly averaged; 0.001 guides more strongly.
    value_attention
        Multiply the relevance with 1000 times the attention of SigLIP's pooling head (off in the released code).
    question, text_tower, tokenizer
        See `GuidedMethod`. A text tower with a longer context can be given as a `tokensieve.pairing.TextPair`.
    """

    retention: float = PUBLISHED
    kernel: Triple | None = None
    weighting: Weighting = "window_softmax"
    temperature: float = TEMPERATURE
    value_attention: bool = False

    name: ClassVar[str] = "ppllava"
    title: ClassVar[str] = "PPLLaVA (training-free)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.02327"
    venue: ClassVar[str] = "ICLR 2026"
    code: ClassVar[str] = "https://github.com/farewellthree/PPLLaVA"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "replace"
    fidelity: ClassVar[Fidelity] = "mostly"
    fidelity_note: ClassVar[str] = (
        "operator and relevance are exact, but the model is not trained for them: tokens are pooled as the host hands "
        "them to the LLM (behind its own pooling of frames, and behind the unpadding of image tiles), the text tower "
        "keeps its context, and images and newlines follow the host's layout"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting not in get_args(Weighting):
            raise MethodError(f"weighting must be one of {', '.join(get_args(Weighting))}, not {self.weighting!r}.")
        if not self.temperature > 0:
            raise MethodError(f"temperature is {self.temperature}, but it must be above 0.")
        if self.kernel is not None:
            numbers = tuple(self.kernel) if isinstance(self.kernel, list | tuple) else ()
            if len(numbers) != 3 or not all(isinstance(number, int) and number >= 1 for number in numbers):
                raise MethodError(f"kernel is {self.kernel!r}; give three numbers from 1 on (frames, rows, columns).")
            self.kernel = numbers

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Patches and question in the space of the pair, and its temperature."""
        wanted = (ALIGNED, QUESTION, SCALE)
        return (*wanted, HEAD_ATTENTION) if self.value_attention else wanted

    def windows(self, layout: Layout) -> list[Window]:
        """Windows of an item: one set for a video, one per view of an image."""
        if layout.kind == "video":
            if not layout.is_uniform:
                raise MethodError(
                    "ppllava pools over time and needs every frame in full, but this model's processor left tokens out."
                )
            return [self._window((len(layout.views), *layout.views[0]), layout.kind)]
        return [self._window((1, *view), layout.kind) for view in layout.views]

    def _window(self, size: Triple, kind: str) -> Window:
        kernel = self.kernel
        if kernel is None:
            if self.retention != PUBLISHED:
                return window_for(size, self.retention)
            kernel = VIDEO_KERNEL if kind == "video" else IMAGE_KERNEL
        # A window larger than the item is the item, as in the model: a clip of one frame is pooled in space alone.
        frames, rows, columns = (min(wanted, given) for wanted, given in zip(kernel, size, strict=True))
        return resolve_window(size, kernel=(frames, rows, columns))

    def token_count(self, layout: Layout) -> int:
        """Windows of all views."""
        return sum(window.tokens for window in self.windows(layout))

    def relevance(self, sample: TokenSample) -> tuple[Tensor, Tensor]:
        """Cosines and relevance ``[n]`` of all patches of an item; the softmax goes over all of them."""
        cosine = cosine_map(sample.signal(ALIGNED)[None], sample.signal(QUESTION).to(sample.features.device))[0]
        relevance = relevance_map(cosine[None, None], sample.signal(SCALE).to(cosine))[0, 0]
        if self.value_attention:
            relevance = VALUE_SCALE * sample.signal(HEAD_ATTENTION).to(relevance) * relevance
        return cosine, relevance

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Pool window by window; newlines stay for grid rows that hold a pooled token."""
        cosine, relevance = self.relevance(sample)
        layout = sample.layout
        windows = self.windows(layout)
        grids = [layout.views[0]] if layout.kind == "video" else list(layout.views)
        frames = len(layout.views) if layout.kind == "video" else 1
        keeps, pooled, maps, start, slot = [], [], [], 0, 0
        for grid, window in zip(grids, windows, strict=True):
            size = frames * grid[0] * grid[1]
            part = slice(start, start + size)
            weights = relevance[part].view(frames, *grid)
            tokens = prompt_guided_pool(
                sample.features[part].view(frames, grid[0] * grid[1], -1),
                weights,
                grid=grid,
                kernel=window.kernel,
                stride=window.stride,
                weighting=self.weighting,
                temperature=self.temperature,
            )
            pooled.append(tokens.flatten(0, 2))
            members = _members((frames, *grid), window)
            shares = window_weights(weights, window, weighting=self.weighting, temperature=self.temperature)
            keeps.append(members[:, _middle(window)] + start)
            target = torch.arange(slot, slot + window.tokens)[:, None].expand_as(members)
            maps.append((members.flatten() + start, target.flatten(), shares.flatten().cpu()))
            start, slot = start + size, slot + window.tokens
        merged = MergeMap(*(torch.cat(columns) for columns in zip(*maps, strict=True)))
        return Plan(
            torch.cat(keeps),
            torch.cat(pooled),
            merged,
            self.position_policy,
            separators="occupied",
            info={"cosine": cosine},
        )


def _members(size: Triple, window: Window) -> Tensor:
    """Patches of every window, ``[windows, patches per window]`` int64, both row-major."""
    places = torch.arange(math.prod(size)).view(size)
    for axis in range(3):
        places = places.unfold(axis, window.kernel[axis], window.stride[axis])
    frames, rows, columns = window.output
    return places[:frames, :rows, :columns].flatten(3).flatten(0, 2)


def _middle(window: Window) -> int:
    """Place of the middle patch inside a window."""
    frames, rows, columns = window.kernel
    return ((frames - 1) // 2 * rows + (rows - 1) // 2) * columns + (columns - 1) // 2


def extended_pair(source: Any) -> Any:
    """The pair of a text tower whose context is stretched (77 -> 248, 64 -> 196), to be given as ``text_tower``.

    Parameters
    ----------
    source
        As for `tokensieve.pairing.load_pair`: folder, hub name, or a pair, whose text tower is changed then.

    Returns
    -------
    tokensieve.pairing.TextPair
        Questions up to the first 20 tokens are embedded as before; longer ones are no longer cut at 77.
    """
    from tokensieve.models.ppllava.context import extend_context
    from tokensieve.pairing import load_pair

    pair = load_pair(source)
    extend_context(pair.text_model)
    pair.text_length = int(pair.text_model.config.max_position_embeddings)
    return pair
