"""SparseVLM: text tokens rate the visual ones inside the LLM; the best of the dropped are merged and go on.

Based on "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv
2410.04417, ICML 2025). The text tokens that the picture matters to rate the visual tokens by their attention in
a few layers. Version 1.0 takes the number to keep from the rank of that attention, version 1.5 fixes it, and
version 2.0 corrects the attention for distance, listens to some heads only and merges nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Method, Stage
from tokensieve.core.plan import Plan, Positions
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, PromptSample
from tokensieve.errors import MethodError
from tokensieve.ops.depth import Numbers, average_shares, interpolated_shares, numbers, spread_layers
from tokensieve.ops.raters import rank_count, rater_attention, text_raters, text_relevance
from tokensieve.ops.recycle import recycle, recycle_counts
from tokensieve.ops.select import top_indices

TEXT = "decoder.text_attention"
BIAS = "decoder.position_bias"
DEPTH, TOKENS = 32, 576
"""Layers and visual tokens of the published settings."""
LAYERS = {"1.0": (2, 6, 15, 19), "1.5": (2, 6, 15), "2.0": (2, 6, 15)}
"""Layers behind which the published settings prune."""
COUNTS = {
    "1.5": ((66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110)),
    "2.0": ((66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118)),
}
"""Published counts for 64, 96, 128 and 192 tokens per layer on average."""
RANK_RULES = ((64 / 576, 0.8, 0.0), (128 / 576, 9.0, 6.0), (192 / 576, 13.5, 0.0))
"""Published scale and bias of version 1.0, by the average share that they are for."""


def count_behind(current: int, kept: int, merges: bool) -> int:
    """Visual tokens behind a pruning layer, merged ones included (count identity of steps 4 and 5)."""
    return kept + (recycle_counts(current - kept)[1] if merges and kept < current else 0)


def kept_for(current: int, total: int, merges: bool) -> int:
    """How many tokens to keep unmerged so that, with the merged ones, a wanted number goes on.

    Parameters
    ----------
    current : int
        Visual tokens in front of the cut.
    total : int
        Wanted number behind it.
    merges : bool
        Whether dropped tokens are merged into additional ones.

    Returns
    -------
    int
        From 1 to ``current``; ``current`` when nothing has to go. Where two numbers lead to the same total, the
        larger one.
    """
    if total >= current:
        return current
    return max(1, bisect_right(range(current), total, key=lambda kept: count_behind(current, kept, merges)) - 1)


def published_shares(version: str) -> list[tuple[float, ...]]:
    """Shares of the visual tokens behind the pruning layers of the published settings, merged ones included."""
    rows = []
    for counts in COUNTS[version]:
        current, row = TOKENS, []
        for kept in counts:
            current = count_behind(current, kept, version == "1.5")
            row.append(current / TOKENS)
        rows.append(tuple(row))
    return rows


@register
@dataclass
class SparseVLM(Method):
    """SparseVLM in its three released versions.

    Parameters
    ----------
    retention
        Share of the visual tokens that goes on behind the last cut, merged ones included; the default is the
        published setting "192 tokens", which keeps 300, 200, 110 of 576. The cuts before it follow the published
        settings, interpolated. In version 1.0 the rank decides, and ``retention`` only chooses the published rule
        that is nearest.
    average
        ``retention`` is the average over all layers instead (1/3 is "192 tokens").
    version
        ``"1.0"`` (count by rank, recycling), ``"1.5"`` (fixed counts, recycling) or ``"2.0"`` (distance correction,
        choice of heads, original positions, no recycling).
    counts
        Tokens kept unmerged at every cut, for example ``"303/110/36"``; decides instead of ``retention``.
    layers
        Layers behind which to prune, for example ``"2/6/15"``; None takes the same share of the depth, behind the
        DeepStack layers.
    scale, bias
        Rule of version 1.0, ``int(rank * scale + bias)``; None takes the published pair nearest to ``retention``.
    heads
        Heads that version 2.0 listens to; None takes 14 of 28 to 32, and half of another number.
    noise
        Numbers that the released clustering draws at each cut, to compare with it. Without them equal densities
        are ordered by index, which is deterministic.
    positions
        None takes what was published: counted anew at every cut in versions 1.0 and 1.5 (on models with several
        position axes a merged token has the coordinates of its cluster's centre), the original ones in 2.0.
    """

    retention: float = 0.196
    average: bool = False
    version: str | float = "1.5"
    counts: Numbers = None
    layers: Numbers = None
    scale: float | None = None
    bias: float | None = None
    heads: int | None = None
    noise: Sequence[Tensor] | None = None

    name: ClassVar[str] = "sparsevlm"
    title: ClassVar[str] = "SparseVLM"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    venue: ClassVar[str] = "ICML 2025"
    code: ClassVar[str] = "https://github.com/Gumpest/SparseVLMs"
    stages: ClassVar[tuple[Stage, ...]] = ("decoder",)
    kind: ClassVar[Kind] = "merge"
    fidelity_note: ClassVar[str] = (
        "clustering without the released code's random numbers unless noise is given; without a text token above the "
        "mean all of them rate; newline embeddings are kept and never ranked"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.version = f"{float(self.version):.1f}"
        except ValueError:
            self.version = str(self.version)
        if self.version not in LAYERS:
            raise MethodError(f"version is {self.version!r}; the released ones are {', '.join(LAYERS)}.")
        if self.counts is not None:
            counts = numbers(self.counts, "counts")
            if self.version == "1.0" or self.average:
                raise MethodError("counts decides alone; leave out average, and use version 1.5 or 2.0.")
            if not all(isinstance(count, int) and count > 0 for count in counts):
                raise MethodError(f"counts must be whole and positive, not {self.counts!r}; for example 303/110/36.")
        if self.heads is not None and self.heads < 1:
            raise MethodError(f"heads is {self.heads}; at least one must be left, for example 14.")
        if self.layers is not None:
            layers = numbers(self.layers, "layers")
            if list(layers) != sorted(set(layers)) or not all(isinstance(layer, int) for layer in layers):
                raise MethodError(f"layers must be whole and ascending, not {self.layers!r}; for example 2/6/15.")

    @property
    def merges(self) -> bool:
        """Whether dropped tokens are recycled."""
        return self.version != "2.0"

    @property
    def position_policy(self) -> Positions:
        """The user's choice, or what the version does."""
        return self.positions or ("renumber" if self.merges else "original")

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """The layers behind the pruning layers."""
        if self.layers is not None:
            return tuple(int(layer) + 1 for layer in numbers(self.layers, "layers"))
        wanted = [round(layer * facts.decoder_layers / DEPTH) + 1 for layer in LAYERS[str(self.version)]]
        cuts = spread_layers(wanted, facts.decoder_layers, max(1, facts.deepstack_layers))
        return cuts if self.counts is None else cuts[: len(numbers(self.counts, "counts"))]

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention of the text, in version 2.0 with its bias by position."""
        return (TEXT,) if self.merges else (TEXT, BIAS)

    def check_host(self, facts: HostFacts) -> None:
        """Layers must exist, be as many as the counts, and reach a wanted average."""
        super().check_host(facts)
        self._shares(facts)

    def token_count(self, layout: Layout) -> int:
        """All tokens enter the LLM; the cuts come later."""
        return layout.patches

    def read_prompt(self, sample: PromptSample) -> dict[str, Any]:
        """The raters, from the inputs of the LLM (steps 1 and 2)."""
        if sample.text.shape[0] == 0:
            raise MethodError(
                "sparsevlm lets the text behind the pictures rate them, but this prompt ends with a picture; put the "
                "question last."
            )
        return {"raters": text_raters(text_relevance(sample.visual, sample.text))}

    def _shares(self, facts: HostFacts) -> tuple[float, ...] | None:
        """Shares behind the cuts; None where counts or ranks decide."""
        cuts, version = self.decoder_layers(facts), str(self.version)
        if self.counts is not None and len(cuts) != len(numbers(self.counts, "counts")):
            raise MethodError(f"sparsevlm has {len(cuts)} cuts but counts is {self.counts!r}; give one per cut.")
        if self.counts is not None or version == "1.0":
            return None
        if len(cuts) > len(LAYERS[version]):
            raise MethodError(f"sparsevlm knows shares for three cuts, not {len(cuts)}; give counts as well.")
        if self.average:
            # A layer counts with the tokens behind it, as in the published labels.
            starts = [cut - 1 for cut in cuts]
            return average_shares(self.retention, starts, facts.decoder_layers, published_shares(version))
        return interpolated_shares(self.retention, published_shares(version))[-len(cuts) :]

    def _count(self, sample: DecoderSample, stage: int, attention: Tensor) -> int:
        """Tokens that stay unmerged (step 4)."""
        assert sample.facts is not None
        current = sample.hidden.shape[0]
        if self.version == "1.0":
            _, scale, bias = min(RANK_RULES, key=lambda rule: abs(rule[0] - self.retention))
            scale = scale if self.scale is None else self.scale
            count = rank_count(attention, scale, bias if self.bias is None else self.bias)
            return current if count is None else count
        if self.counts is not None:
            return max(1, min(int(numbers(self.counts, "counts")[stage]), current - 1))
        shares = self._shares(sample.facts)
        assert shares is not None
        return kept_for(current, round(shares[stage] * sample.entered), self.merges)

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Rate, keep the best, recycle the best of the others."""
        assert sample.facts is not None
        stage = self.decoder_layers(sample.facts).index(sample.layer)
        attention = sample.signal(TEXT)
        if self.merges:
            attention = rater_attention(attention, sample.memory["raters"])
        else:
            heads = attention.shape[0]
            chosen = self.heads or (14 if 28 <= heads <= 32 else max(1, round(heads / 2)))
            attention = rater_attention(attention, sample.memory["raters"], sample.signal(BIAS), chosen)
        scores = attention.mean(dim=0)
        count = self._count(sample, stage, attention)
        keep = top_indices(scores, count)
        info = {"scores": scores}
        if not self.merges or count >= scores.numel():
            return Plan(keep, positions=self.position_policy, info=info)
        dropped = torch.ones_like(scores, dtype=torch.bool)
        dropped[keep] = False
        others = dropped.nonzero()[:, 0]
        candidates, clusters = recycle_counts(others.numel())
        best = others[top_indices(scores[others], candidates, order="rank")].to(sample.hidden.device)
        noise = None if self.noise is None else self.noise[stage]
        merged = recycle(sample.hidden[best], clusters, noise)
        keep = torch.cat((keep.to(best.device), best[merged.centres]))
        features = torch.cat((sample.hidden[keep[:count]], merged.features))
        return Plan(keep, features, positions=self.position_policy, info=info)
