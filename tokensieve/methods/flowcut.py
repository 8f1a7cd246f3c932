"""FlowCut: scores from the information flow of every encoder layer, patches dropped while the encoder runs.

Based on "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models" (arXiv
2505.19536, NeurIPS 2025). A patch scores by the attention of the class token, by the likeness of its value
vector to that of the class token, and by the length of the value. Scores are smoothed over layers; every second
layer drops some patches, more of them the more concentrated the attention is.

Images of several pictures (a base picture and tiles) leave the encoder with half of the wanted number of patches a
picture, two and a half times as many in all; the LLM drops the rest behind its second layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.core.tower import Block, Together, TowerProgram, TowerSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.information_flow import flow_scores, mean_query_attention, prune_counts, semantic_attention
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32

CLASS = "tower.class_token"
PACKED = "tower.packed_blocks"
SQUARE = 4
"""Patches that packed towers join into a token."""
GROUPS = "encoder.groups"
ATTENTION = "decoder.visual_attention"
LIKENESS = "decoder.value_likeness"
LENGTH = "decoder.value_length"
SMOOTHING = 0.5


def is_pruning_layer(layer: int, last: int) -> bool:
    """Whether patches are dropped behind layer ``layer``: every second one up to ``last`` (step 2f)."""
    return layer <= last and (last - layer) % 2 == 0


@dataclass
class EncoderFlow:
    """State of the progressive pruning of one batch of pictures (A).

    Parameters
    ----------
    target
        T, patches to keep per picture.
    last
        Index of the last pruning layer: ``L - 3`` where the output of layer ``L - 2`` is projected (CLIP),
        ``L - 1`` in Qwen towers.
    normalise
        False for the Qwen form, see `flow_scores` and `prune_counts`.

    Attributes
    ----------
    score : Tensor [B, n]
        Smoothed score of the patches left.
    idx : Tensor [B, n]
        Their original ids, ascending.
    trace : list of (int, int, int, int)
        Patches, layers left, target and patches to drop of every pruning layer.
    """

    target: int
    last: int
    normalise: bool = True
    score: Tensor | None = None
    idx: Tensor | None = None
    trace: list[tuple[int, int, int, int]] = field(default_factory=list)

    def step(self, layer: int, attention: Tensor, semantic: Tensor | None, values: Tensor) -> Tensor | None:
        """Take in one layer and say which of the patches left go on (step 2).

        Parameters
        ----------
        layer : int
            Index of the layer that has just run.
        attention, semantic, values : Tensor
            As `flow_scores`, for the patches left.

        Returns
        -------
        Tensor, optional
            ``[B, n']`` int64 places among the n patches left, ascending, to gather the output of the layer by;
            None when all go on.
        """
        batch, count = attention.shape
        if self.idx is None:
            self.idx = torch.arange(count, device=attention.device).expand(batch, -1)
        if count <= self.target:
            return None
        fresh = flow_scores(attention, semantic, values, self.normalise)
        self.score = fresh if self.score is None else SMOOTHING * self.score + SMOOTHING * fresh
        if not is_pruning_layer(layer, self.last):
            return None
        remaining = self.last - layer
        # The batch is coupled: its most concentrated picture decides, so that all keep equally many.
        drop = int(prune_counts(attention, remaining, self.target, self.normalise).max())
        self.trace.append((count, remaining, self.target, drop))
        if drop == 0:
            return None
        keep = top_indices(self.score, count - drop)
        self.score, self.idx = self.score.gather(1, keep), self.idx.gather(1, keep)
        return keep


def select_in_decoder(
    q_last: Tensor, k: Tensor, v_last: Tensor, v: Tensor, target: int, normalise: bool = True
) -> Tensor:
    """Visual tokens that survive the prune behind the second LLM layer (B).

    Parameters
    ----------
    q_last : Tensor
        ``[H, d]`` query of the last prompt token behind the rotary embedding.
    k, v : Tensor
        ``[H_kv, V, d]`` keys (behind the rotary embedding) and values of the visual tokens.
    v_last : Tensor
        ``[H_kv, d]`` value of the last prompt token.
    target : int
        Tokens to keep; all survive when there are no more.
    normalise : bool
        Divide attention and likeness by their sums (LLaVA-NeXT); they sum to 1 already up to rounding.

    Returns
    -------
    Tensor
        ``[min(target, V)]`` int64, ascending, counted from the first visual token.

    Raises
    ------
    MethodError
        If the heads do not match or ``target`` is below 1.
    """
    heads, kv_heads = q_last.shape[0], k.shape[0]
    if heads % kv_heads or target < 1:
        raise MethodError(
            f"cannot keep {target} visual tokens with {heads} query and {kv_heads} key heads; keep at least 1 and "
            "use a multiple of the key heads."
        )
    scale = q_last.shape[-1] ** -0.5
    grouped = as_float32(q_last).unflatten(0, (kv_heads, -1))
    attention = (torch.einsum("ghd,gnd->ghn", grouped, as_float32(k)) * scale).softmax(dim=-1).mean(dim=(0, 1))
    likeness = semantic_attention(v[None], v_last[None], scale)
    score = flow_scores(attention[None], likeness, as_float32(v).mean(dim=0)[None], normalise)
    return top_indices(score[0], target)


class FlowProgram(TowerProgram):
    """Progressive pruning of pictures that are encoded together (A).

    Parameters
    ----------
    target : int
        T, patches to keep per picture.
    last : int
        Index of the last pruning layer.
    """

    def __init__(self, target: int, last: int) -> None:
        self.flow = EncoderFlow(target, last)

    def drop(self, block: Block) -> Tensor | None:
        """One row of attention and the values of the block; nothing once the target is reached."""
        if block.layer > self.flow.last or block.patches <= self.flow.target:
            return None
        values = as_float32(block.v)
        likeness = semantic_attention(values)
        return self.flow.step(block.layer, block.class_attention(), likeness, values[:, :, 1:].mean(dim=1))


class PackedFlowProgram(TowerProgram):
    """The form for towers without class token (C): the mean query asks, values count by length, no likeness.

    Parameters
    ----------
    target : int
        Patches to keep per temporal step.
    last : int
        Index of the last block.
    """

    def __init__(self, target: int, last: int) -> None:
        self.flow = EncoderFlow(target, last, normalise=False)

    def drop(self, block: Block) -> Tensor | None:
        """One row of attention and the values of the block."""
        if block.patches <= self.flow.target:
            return None
        attention = mean_query_attention(block.q, block.k)
        return self.flow.step(block.layer, attention, None, as_float32(block.v).mean(dim=1))


@register
@dataclass
class FlowCut(Method):
    """FlowCut: patches dropped in every second block of the vision tower, and in the LLM for tiled images.

    Parameters
    ----------
    coupled
        Pictures of one image or video drop equally many patches in a block, as the released code does with a batch;
        the most concentrated one decides. Otherwise every picture runs alone.
    decoder_layer
        Layer in front of which the LLM drops the rest for hosts that cut images into tiles; None leaves all of it
        to the tower.
    """

    coupled: bool = True
    decoder_layer: int | None = 2

    name: ClassVar[str] = "flowcut"
    title: ClassVar[str] = "FlowCut"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.19536"
    venue: ClassVar[str] = "NeurIPS 2025"
    code: ClassVar[str] = "https://github.com/TungChintao/FlowCut"
    stages: ClassVar[tuple[Stage, ...]] = ("encoder", "tokens", "decoder")
    exact_count: ClassVar[bool] = False
    fidelity: ClassVar[Fidelity] = "exact"
    fidelity_note: ClassVar[str] = (
        "pictures of different images of a batch do not influence each other, as with the released code at batch 1; in "
        "Qwen2-VL, whose released form takes one image, the steps of a video keep equally many patches each"
    )

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Every block with its class token, or of a packed tower, and which patches are left."""
        blocks = PACKED if facts.drops_packed else CLASS
        return (blocks, GROUPS) if self.retention < 1.0 else (blocks,)

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """One cut for hosts with tiled images or a packed tower."""
        cuts = facts.tiled_images or facts.drops_packed
        return (self.decoder_layer,) if cuts and self.decoder_layer is not None else ()

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention and values of the last prompt token and the visual tokens."""
        return (ATTENTION, LIKENESS, LENGTH)

    def check_host(self, facts: HostFacts) -> None:
        """The tower must have a block in front of the projected one."""
        super().check_host(facts)
        if facts.feature_layer < 1:
            raise MethodError(
                "flowcut drops patches up to the block in front of the projected one, but this tower projects its "
                "first block; use another method."
            )

    @property
    def tower_together(self) -> Together:
        """Pictures of one item, or each alone."""
        return "item" if self.coupled else "picture"

    def token_count(self, layout: Layout) -> int | None:
        """Not known from geometry: it depends on the host whether the LLM drops the rest."""
        return None

    def tower_program(self, sample: TowerSample) -> TowerProgram:
        """T patches a picture: the share kept, or half of an image's tokens where the LLM drops the rest.

        A packed tower keeps twice the tokens that are wanted in the end, each of four patches.
        """
        if not sample.class_token:
            wanted = keep_count(sample.tokens, self.retention) * (2 if self.decoder_layers(sample.facts) else 1)
            target = min(sample.patches, SQUARE * max(1, wanted // sample.pictures))
            return PackedFlowProgram(target, sample.layers - 1)
        target = keep_count(sample.patches, self.retention)
        tiled = not sample.is_video and sample.tokens > sample.patches
        if tiled and self.decoder_layers(sample.facts):
            target = max(1, keep_count(sample.tokens, self.retention) // 2)
        return FlowProgram(target, sample.layers - 2)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """What the tower left; the newlines of tiled images go."""
        keep = (sample.signal(GROUPS) >= 0).nonzero()[:, 0]
        tiled = sample.layout.kind == "image" and len(sample.layout.views) > 1
        return Plan(keep, positions=self.position_policy, separators="drop" if tiled else "in-place")

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """The best tokens by the values of the layer that has just run (B)."""
        if sample.uncompressed is None:
            raise MethodError("flowcut needs the number of patches of every item; call it through a model.")
        target = sum(keep_count(int(patches), self.retention) for patches in sample.uncompressed)
        terms = (sample.signal(ATTENTION), sample.signal(LIKENESS))
        score = sum(term / term.sum() for term in terms) * sample.signal(LENGTH)
        return Plan(top_indices(score, target), positions=self.position_policy)
