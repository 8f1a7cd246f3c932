"""From the placeholders of a prompt to plans, and from plans to a shorter sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.budget import allocate
from tokensieve.core.compactor import Compaction, Placement, arrange_row, identity, pad_rows
from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import ItemKind
from tokensieve.core.method import Method
from tokensieve.core.plan import Plan, keep_all, reading_order
from tokensieve.core.sample import FrameSample, HostFacts, TokenSample
from tokensieve.core.signals import SIGNALS, SignalRequest, unit_of
from tokensieve.core.trace import ItemTrace, PrefillTrace
from tokensieve.core.words import PromptWords
from tokensieve.errors import HostError, MethodError
from tokensieve.hosts.base import Host


@dataclass
class PromptItem:
    """A visual item at its place in a prompt row.

    Attributes
    ----------
    positions : Tensor [tokens]
        Places of its tokens.
    plan
        Decision of the tokens stage.
    budgets
        Number of a decoder method -> tokens that every frame may keep.
    signals
        Requested tower signals of its patches.
    given
        Signals of its patches that were read from the prompt as a whole.
    text, text_before : Tensor [T]
        Places of the text behind it and in front of it, as far as the next item or the end of the row.
    """

    row: int
    call: EncodeCall
    encoded: EncodedItem
    positions: Tensor
    plan: Plan | None = None
    budgets: dict[int, Tensor] = field(default_factory=dict)
    signals: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    text: Tensor | None = None
    text_before: Tensor | None = None


@dataclass
class Tracked:
    """Where every token of the compacted batch came from, [B, L'] each; -1 for text and padding.

    Attributes
    ----------
    item, patch
        Visual item (counted over the batch) and patch of it; patch is -1 for separators.
    token
        Token of the item's layout, separators included.
    """

    item: Tensor
    patch: Tensor
    token: Tensor

    def at(self, index: Tensor, pad: Tensor) -> Tracked:
        """Origins of the tokens at ``index [B, L']``, with ``pad [B, L']`` marking padding."""
        item, patch, token = (
            part.gather(1, index).masked_fill(pad, -1) for part in (self.item, self.patch, self.token)
        )
        return Tracked(item, patch, token)


def locate(
    base: nn.Module,
    host: Host,
    calls: Mapping[ItemKind, EncodeCall],
    ids: Tensor,
    arguments: Mapping[str, Any],
) -> list[PromptItem]:
    """Match encoder calls with the placeholders of a prompt.

    Features fill placeholders in row-major order. When ``generate`` has repeated the rows (beams, several
    return sequences) every encoded item serves that many consecutive rows.

    Parameters
    ----------
    ids : Tensor [B, L]
        Token ids on the CPU.
    arguments
        Arguments of the composite model's forward pass.

    Raises
    ------
    HostError
        When features and placeholders do not match.
    """
    found: list[PromptItem] = []
    batch, length = ids.shape
    for modality, call in calls.items():
        token_id = host.placeholder_id(base, modality)
        if token_id is None:
            raise HostError(f"{host.slug} names no placeholder token for {modality}s in its configuration.")
        places = torch.eq(ids, token_id).flatten().nonzero().flatten()
        items = host.regroup(base, call, ids, arguments)
        total = sum(item.layout.tokens for item in items)
        if total == 0 or places.numel() == 0:
            continue
        copies, rest = divmod(places.numel(), total)
        if rest or batch % copies:
            raise HostError(
                f"The prompt has {places.numel()} {modality} placeholders but the encoder gave {total} features; "
                "pass the prompt in one piece (no prefill_chunk_size) with the features that belong to it."
            )
        found += _place(items, call, places, copies, batch, length)
    return sorted(found, key=lambda item: (item.row, int(item.positions[0])))


def pair_text(items: Sequence[PromptItem], real: Tensor) -> None:
    """Tell every item which text stands around it.

    Parameters
    ----------
    items
        Of the batch, in prompt order.
    real : Tensor [B, L]
        Padding mask.
    """
    for row in range(real.shape[0]):
        mine = [item for item in items if item.row == row]
        bounds = [-1, *(int(item.positions[-1]) for item in mine)]
        starts = [*(int(item.positions[0]) for item in mine), real.shape[1]]
        gaps = [
            real[row, last + 1 : first].nonzero().flatten() + last + 1
            for last, first in zip(bounds, starts, strict=True)
        ]
        for item, before, behind in zip(mine, gaps[:-1], gaps[1:], strict=True):
            item.text_before, item.text = before, behind


def _place(
    items: Sequence[EncodedItem], call: EncodeCall, places: Tensor, copies: int, batch: int, length: int
) -> list[PromptItem]:
    """Deal the placeholders of all rows out to the items."""
    per_row = torch.bincount(places // length, minlength=batch)
    found, cursor, queue = [], 0, list(items)
    for first in range(0, batch, copies):
        need, mine = int(per_row[first]), []
        while need > 0:
            if not queue or queue[0].layout.tokens > need:
                raise HostError("A visual item does not end where its placeholders end; check the processor's output.")
            mine.append(queue.pop(0))
            need -= mine[-1].layout.tokens
        for row in range(first, first + copies):
            for item in mine:
                spots = places[cursor : cursor + item.layout.tokens]
                if int(spots[0]) // length != row or int(spots[-1]) // length != row:
                    raise HostError("The rows of the batch do not hold the same visual placeholders.")
                found.append(PromptItem(row, call, item, spots - row * length))
                cursor += item.layout.tokens
    return found


class Planner:
    """Runs the tokens stage of the methods on every visual item of a prompt."""

    def __init__(
        self,
        base: nn.Module,
        host: Host,
        facts: HostFacts,
        methods: Sequence[Method],
        requests: Sequence[SignalRequest],
        words: PromptWords | None = None,
    ) -> None:
        self.base, self.host, self.facts, self.requests = base, host, facts, requests
        self.words = words
        self.token_method = next((m for m in methods if "tokens" in m.stages), None)
        self.decoder_methods = [m for m in methods if "decoder" in m.stages]
        frame_method = next((m for m in methods if "frames" in m.stages), None)
        self.frame_method = frame_method
        self.default_positions = frame_method.position_policy if frame_method else "renumber"

    def plan(self, item: PromptItem, embeds: Tensor, index: int) -> None:
        """Fill in the plan of one item and the frame budgets that decoder methods will need.

        Parameters
        ----------
        embeds : Tensor [L, D]
            Input embeddings of the item's row.
        """
        layout = item.encoded.layout
        kept_views = self._frames(item, index)
        part, tokens = layout.of_views(kept_views) if kept_views is not None else (layout, None)
        positions = item.positions if tokens is None else item.positions[tokens]
        patch_positions = positions[part.patch_tokens].to(embeds.device)
        features = embeds.index_select(0, patch_positions)
        signals = item.signals = self._signals(item)
        if tokens is not None:
            assert kept_views is not None
            kept = {"patch": torch.isin(layout.patch_view, kept_views), "view": kept_views}
            signals = {key: value[kept[unit_of(key)].to(value.device)] for key, value in signals.items()}
        if self.words is not None and self.token_method is not None and self.token_method.retention < 1.0:
            signals = signals | self.words.row(item.row)
        project = partial(self.host.project, self.base) if self.host.projects_patches else None
        sample = TokenSample(features, part, signals, self.facts, index=index, project=project)
        if item.text is not None and item.text_before is not None:
            sample.text = embeds.index_select(0, item.text.to(embeds.device))
            sample.text_before = embeds.index_select(0, item.text_before.to(embeds.device))
        for number, method in enumerate(self.decoder_methods):
            if method.budget is not None:
                item.budgets[number] = allocate(method.budget, sample, method.retention)
        plan = self._plan_tokens(sample)
        if item.call.tower_tokens is not None:
            plan.info = {**plan.info, **self._tower_info(item)}
        if tokens is not None:
            plan = _onto(plan, layout.patches, tokens, layout.patch_tokens, part.patch_tokens)
            plan.info = {**plan.info, "views": kept_views}
            plan.views = kept_views if plan.views is None or kept_views is None else kept_views[plan.views]
        item.plan = plan

    def _plan_tokens(self, sample: TokenSample) -> Plan:
        method = self.token_method
        patches = sample.layout.patches
        if method is None:
            return keep_all(patches, self.default_positions)
        if method.retention >= 1.0:
            return keep_all(patches, method.position_policy)
        if not torch.isfinite(sample.features.sum(dtype=torch.float32)):
            raise MethodError(
                "The visual features hold NaN or infinity; check the weights and the dtype (float16 overflows in "
                "some towers, bfloat16 does not)."
            )
        if method.budget is not None:
            sample.budget = allocate(method.budget, sample, method.retention)
        return method.run_tokens(sample).checked(patches, method.name)

    def _frames(self, item: PromptItem, index: int) -> Tensor | None:
        """Views that the frames stage keeps; decided here for hosts that encode frames as single pictures."""
        encoded = item.encoded
        views = len(encoded.layout.views)
        if encoded.frames_kept is None and self.frame_method is not None and encoded.layout.kind == "video":
            encoded.frames_kept = self.frame_method.plan_frames(FrameSample(views, index)).long().cpu()
        return encoded.frames_kept

    def _signals(self, item: PromptItem) -> dict[str, Tensor]:
        """Requested tower signals for every patch of the item [n]; frames that were not encoded hold zeros."""
        signals = dict(item.given)
        encoded = item.encoded
        whole = encoded.whole or encoded
        call, source = whole.fewer or (item.call, whole)
        for request in self.requests:
            raw = item.call.raw.get(str(request))
            if raw is None:
                raise HostError(f"The encoder gave no {request}; encode inside of the compressed run.")
            pooled = self._pooled(call, source, raw[source.units], request)
            if whole.fewer is not None:
                assert whole.frames_kept is not None
                per_view = SIGNALS[request.name].unit == "view"
                views = torch.arange(len(whole.layout.views)) if per_view else whole.layout.patch_view
                spread = pooled.new_zeros(views.numel(), *pooled.shape[1:])
                spread[torch.isin(views, whole.frames_kept).to(pooled.device)] = pooled
                pooled = spread
            if encoded.present is not None and SIGNALS[request.name].unit != "view":
                pooled = pooled[encoded.present.to(pooled.device)]
            signals[str(request)] = pooled
        return signals

    @staticmethod
    def _tower_info(item: PromptItem) -> dict[str, Tensor]:
        """What became of the item inside the tower, for reports and pictures.

        ``tower_tokens`` [layers, 2] are the tokens that attention and feed-forward part of every block saw, mean over
        the pictures; ``tower_groups`` [pictures, N] the token that each patch became part of, -1 for dropped ones.
        """
        whole = item.encoded.whole or item.encoded
        _, source = whole.fewer or (item.call, whole)
        assert item.call.tower_tokens is not None
        seen, groups = item.call.tower_tokens[source.units], item.call.raw["encoder.groups"][source.units]
        found = {"tower_tokens": seen.float().mean(0)}
        return {**found, "tower_groups": groups.cpu()} if groups.dim() == 2 else found

    def _pooled(self, call: EncodeCall, item: EncodedItem, raw: Tensor, request: SignalRequest) -> Tensor:
        """A tower signal brought to the item's tokens, channel by channel where it has channels [n] or [n, d]."""
        signal = SIGNALS[request.name]
        if signal.unit == "view":
            return self.host.pool_views(item, raw)
        pool = self.host.pool if signal.shape == "[n]" else self.host.pool_channels
        return pool(self.base, call, item, raw)


def _onto(plan: Plan, patches: int, tokens: Tensor, all_tokens: Tensor, part_tokens: Tensor) -> Plan:
    """A plan for some frames of an item in the patch ids of the whole item."""
    rank = torch.full((int(all_tokens.max()) + 1,), -1)
    rank[all_tokens] = torch.arange(patches)
    whole = rank[tokens[part_tokens]]
    plan.keep = whole[plan.keep]
    if plan.merged is not None:
        plan.merged = plan.merged._replace(source=whole[plan.merged.source])
    return plan


def compact(
    items: Sequence[PromptItem], real: Tensor
) -> tuple[Compaction, Tracked, PrefillTrace, list[tuple[int, Tensor, Tensor]]]:
    """Carry all plans of a batch out on index level.

    Parameters
    ----------
    items
        Planned items of the batch.
    real : Tensor [B, L]
        Padding mask before.

    Returns
    -------
    The compaction, the origin of every new token, the trace, and the replacements
    ``(row, new positions, their embeddings)``.
    """
    batch, length = real.shape
    trace = PrefillTrace(before=real.sum(1).tolist())
    item_of = torch.full((batch, length), -1)
    patch_of = torch.full((batch, length), -1)
    token_of = torch.full((batch, length), -1)
    slot_of = torch.full((batch, length), -1)
    placements: list[list[Placement]] = [[] for _ in range(batch)]
    counters = [0] * batch
    for number, item in enumerate(items):
        assert item.plan is not None
        layout = item.encoded.layout
        tokens, slots = reading_order(layout, item.plan)
        placements[item.row].append(Placement(item.positions, tokens))
        item_of[item.row, item.positions] = number
        patch_of[item.row, item.positions[layout.patch_tokens]] = torch.arange(layout.patches)
        patch_of[item.row, item.positions[tokens[slots < 0]]] = -1
        token_of[item.row, item.positions] = torch.arange(layout.tokens)
        slot_of[item.row, item.positions[tokens]] = slots
        trace.items.append(
            ItemTrace(
                item.row,
                counters[item.row],
                layout,
                item.plan.keep,
                int((slots < 0).sum()),
                item.plan.merged,
                item.plan.info,
            )
        )
        counters[item.row] += 1
    rows = [arrange_row(real[b], placements[b]) for b in range(batch)]
    untouched = all(row.numel() == int(real[b].sum()) and bool((row.diff() > 0).all()) for b, row in enumerate(rows))
    left = bool(real[:, -1].all())
    compaction = identity(real) if untouched else pad_rows(rows, length, left)
    trace.after = compaction.real.sum(1).tolist()
    pick = compaction.index
    tracked = Tracked(item_of, patch_of, token_of).at(pick, ~compaction.real)
    new_slot = slot_of.gather(1, pick).masked_fill(~compaction.real, -1)
    replacements = []
    for number, item in enumerate(items):
        assert item.plan is not None
        mine, slots = tracked.item[item.row] == number, new_slot[item.row]
        features, separator = item.plan.features, item.plan.separator
        if features is not None:
            spots = (mine & (slots >= 0)).nonzero().flatten()
            replacements.append((item.row, spots, features[slots[spots].to(features.device)]))
        spots = (mine & (slots == -2)).nonzero().flatten()
        if separator is not None and spots.numel():
            replacements.append((item.row, spots, separator.expand(spots.numel(), -1)))
    return compaction, tracked, trace, replacements
