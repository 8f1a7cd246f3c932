"""Cutting the sequence inside the decoder, and keeping every later layer aligned with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.cache import cache_of
from tokensieve.core.compactor import (
    Compaction,
    Placement,
    arrange_row,
    gather_positions,
    gather_sequence,
    pad_rows,
    renumbered,
)
from tokensieve.core.cuts import Cut
from tokensieve.core.decoder_signals import DecoderSignals, RowView
from tokensieve.core.decoding import DecodingStage
from tokensieve.core.eviction import evict
from tokensieve.core.feed import FeedHooks
from tokensieve.core.ledger import Span
from tokensieve.core.masks import causal_mask, on_device, shifted_tables
from tokensieve.core.method import Method
from tokensieve.core.plan import Plan
from tokensieve.core.prompt_state import Aside, Prompt
from tokensieve.core.sample import HostFacts, PromptSample
from tokensieve.core.sampling import decoder_sample
from tokensieve.hosts.base import Host


class DecoderStage:
    """Hooks on the decoder layers of one model.

    Parameters
    ----------
    base, host, facts
        The model and what is known of it.
    methods
        Methods with a decoder stage, in order.
    selecting
        All methods of the run, among which one may select cache entries while decoding.
    hide_positions
        Hand the layers no position ids in a prefill. Kernels that read packed sequences off gaps in the
        positions would misread a pruned prompt; the rotary tables carry the true positions anyway.
    """

    def __init__(
        self,
        base: Any,
        host: Host,
        facts: HostFacts,
        methods: Sequence[Method],
        selecting: Sequence[Method],
        hide_positions: bool,
        clock: Any,
    ) -> None:
        self.base, self.host, self.facts = base, host, facts
        self.clock = clock
        self.hide_positions = hide_positions
        self.layers = host.layers(base)
        self.text_model = host.text_model(base)
        self.config = self.text_model.config
        self.cuts = _collect(methods, facts)
        wanted = {cut: set(method.decoder_signals(facts)) for cut, (_, method) in self.cuts.items()}
        self.signals = DecoderSignals(host, self.text_model, list(self.layers), wanted, self._row_views, clock)
        self.decoding = DecodingStage(host, self.text_model, list(self.layers), facts, selecting, clock)
        self.prompt: Prompt | None = None
        self.spans: dict[int, Span] = {}
        self._earlier: dict[int, Span] = {}
        self._removed = 0
        self._shift: Tensor | None = None
        self._swap: dict[str, Any] = {}
        self._aside: Aside | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Install the hooks."""
        self._handles = [*self.signals.listen(), *self.decoding.listen()]
        inner = {cut.layer: FeedHooks(self.layers[cut.layer]) for cut in self.cuts if cut.point == "feed"}
        for index, layer in enumerate(self.layers):
            hook = self._before_layer(index, inner.get(index))
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for index, feed in inner.items():
            self._handles += feed.attach(self._before_feed(Cut(index, "feed")))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.end()

    def begin(self, prompt: Prompt, removed: int, earlier: dict[int, Span], embeds: Tensor) -> None:
        """A prefill with visual tokens is about to run.

        Parameters
        ----------
        prompt
            The batch, already shortened by the tokens stage.
        removed
            How many tokens that stage removed.
        earlier
            First decoder layer -> span of the cache that earlier turns left.
        embeds : Tensor [B, L, D]
            Inputs of the first layer.
        """
        self.prompt, self._earlier = prompt, earlier
        self._removed, self._shift, self._aside = removed, None, None
        if earlier and earlier[0].visual is not None and earlier[0].visual.numel():
            prompt.number_from(max(int(span.visual.max()) for span in earlier.values() if span.visual is not None) + 1)
        self.spans = {}
        self._open_span(0)
        for number, method in self.cuts.values():
            for row in range(embeds.shape[0]):
                if (number, row) not in prompt.memory and prompt.visual(row).numel():
                    states = embeds[row]
                    places = (prompt.visual(row).to(states.device), prompt.behind(row).to(states.device))
                    sample = PromptSample(*(states.index_select(0, place) for place in places))
                    prompt.memory[number, row] = method.read_prompt(sample)

    def end(self) -> None:
        """Forget the pass."""
        self.prompt = self._aside = None
        self._swap = {}
        self.signals.forget()
        self.decoding.end()

    def _row_views(self, cut: Cut, layer: int) -> list[RowView | None]:
        """Where things stand in every row of the present prefill; nothing outside of a prefill."""
        prompt = self.prompt
        if prompt is None:
            return []
        keys = prompt.keys(layer)
        number, method = self.cuts.get(cut, (-1, None))
        views: list[RowView | None] = []
        for row in range(prompt.real.shape[0]):
            if method is not None and not method.acts(cut, prompt.memory.get((number, row), {})):
                views.append(None)
                continue
            visual = prompt.visual(row, method is not None and method.cuts_separators)
            text, rows = prompt.text(row), prompt.rows(row)
            views.append(
                RowView(visual, prompt.behind(row), text, prompt.last(row), keys[row], rows, prompt.total[row])
            )
        return views

    def _before_layer(self, index: int, feed: FeedHooks | None) -> Any:
        front = next((cut for cut in self.cuts if cut.layer == index and cut.point == "layer"), None)

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.prompt is not None:
                if self.hide_positions:
                    kwargs["position_ids"] = None
                if index == 0 and any(cut.restore for cut in self.cuts):
                    self._aside = Aside.start(self.prompt, hidden, kwargs, self._removed)
                shorter = None
                if front is not None:
                    with self.clock("compress"):
                        shorter = self._cut(front, hidden, {**kwargs, **self._swap})
                if shorter is not None:
                    hidden = shorter
                elif index in self._earlier and (index > 0 or self._earlier[0].offset is not None):
                    self._realign(index, hidden, kwargs)
                kwargs.update(on_device(self._swap, hidden.device))
                if feed is not None:
                    feed.arguments = dict(kwargs)
            elif not self.decoding.align(index, hidden, kwargs):
                return None
            if args:
                return (hidden, *args[1:]), kwargs
            kwargs["hidden_states"] = hidden
            return args, kwargs

        return hook

    def _before_feed(self, cut: Cut) -> Any:
        def shorten(hidden: Tensor, arguments: dict[str, Any]) -> Tensor | None:
            if self.prompt is None:
                return None
            with self.clock("compress"):
                return self._cut(cut, hidden, arguments)

        return shorten

    def _cut(self, cut: Cut, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Shorten the batch and remember what the layers from here on must be given; None when nobody acts."""
        assert self.prompt is not None
        prompt, (number, method) = self.prompt, self.cuts[cut]
        batch = hidden.shape[0]
        if not any(method.acts(cut, prompt.memory.get((number, row), {})) for row in range(batch)):
            return None
        if cut.restore:
            assert self._aside is not None
            last = not any(other.restore and other.first > cut.first for other in self.cuts)
            hidden = self._aside.bring_back(prompt, hidden, kwargs, last)
            self._removed = self._aside.removed
            self._aside = None if last else self._aside
        offset = self._earlier_offset(cut.first)
        if offset is not None and prompt.positions is not None:
            kwargs["position_embeddings"] = shifted_tables(self.text_model, prompt.positions, offset, hidden)
        visual = [prompt.visual(row, method.cuts_separators) for row in range(batch)]
        plans = [self._plan_row(row, cut, hidden, visual[row], kwargs) for row in range(batch)]
        dropped = [_left_out(places, plan) for places, plan in zip(visual, plans, strict=True)]
        fate = next((plan.fate for plan in plans if plan is not None), "gone")
        if fate == "aside" and self._aside is not None:
            self._aside.put(prompt, hidden, dropped)
        if fate == "evicted":
            self._evict(cut, [prompt.present[row, places] for row, places in enumerate(dropped)], kwargs)
        compaction = self._compaction(plans, visual, dropped, fate == "hidden")
        shorter = gather_sequence(hidden, compaction.index) if fate != "hidden" else hidden
        for row, plan in enumerate(plans):
            if plan is not None and plan.features is not None:
                shorter = self._replace(shorter, row, visual[row][plan.keep], plan.features, compaction)
        if fate == "hidden":
            prompt.real = compaction.real
        else:
            prompt.move(compaction.index, compaction.real)
        self._removed += compaction.removed
        renumber = any(plan is not None and plan.positions == "renumber" for plan in plans)
        if cut.first < len(self.layers):
            self._record(cut.first)
            self._swap = self._aligned(cut.first, compaction, shorter, kwargs, renumber)
        return shorter

    def _compaction(
        self, plans: list[Plan | None], visual: list[Tensor], dropped: list[Tensor], hide: bool
    ) -> Compaction:
        """Where every token of the batch goes."""
        assert self.prompt is not None
        prompt = self.prompt
        if hide:
            real = prompt.real.clone()
            for row, places in enumerate(dropped):
                real[row, places] = False
            return Compaction(torch.arange(real.shape[1]).expand_as(real), real, real.shape[1])
        rows = []
        for row, plan in enumerate(plans):
            real = prompt.real[row]
            if plan is not None and plan.separators == "occupied":
                real = real & ~prompt.lone_separators(row, visual[row][plan.keep])
            rows.append(arrange_row(real, [] if plan is None else [Placement(visual[row], plan.keep)]))
        return pad_rows(rows, prompt.real.shape[1], bool(prompt.real[:, -1].all()))

    @staticmethod
    def _replace(hidden: Tensor, row: int, sources: Tensor, features: Tensor, compaction: Compaction) -> Tensor:
        """States of survivors that a method replaced; ``sources`` are their positions before the cut."""
        place = torch.full((compaction.length,), -1)
        real = compaction.real[row].nonzero().flatten()
        place[compaction.index[row, real]] = real
        hidden = hidden.clone()
        hidden[row, place[sources].to(hidden.device)] = features.to(hidden)
        return hidden

    def _plan_row(self, row: int, cut: Cut, hidden: Tensor, visual: Tensor, kwargs: dict[str, Any]) -> Plan | None:
        """The method's decision for one row; None where it has none to make."""
        assert self.prompt is not None
        prompt, (number, method) = self.prompt, self.cuts[cut]
        memory = prompt.memory.get((number, row), {})
        if visual.numel() == 0 or not method.acts(cut, memory):
            return None
        tables, cache = kwargs["position_embeddings"], cache_of(kwargs)
        signals = self.signals.read(cut, row, hidden, tables, cache)
        sample = decoder_sample(prompt, row, cut, number, method, hidden, visual, signals, self.facts)
        plan = method.plan_decoder(sample).checked(visual.numel(), method.name, method.may_be_empty)
        if self.facts.position_axes > 1:
            plan.positions = "original"
        return plan

    def _evict(self, cut: Cut, dropped: list[Tensor], kwargs: dict[str, Any]) -> None:
        """Take tokens out of the caches of all layers that have run."""
        cache = cache_of(kwargs)
        if cache is None:
            return
        firsts = [first for first in sorted(self.spans) if first < cut.first]
        for first, following in zip(firsts, [*firsts[1:], cut.first], strict=True):
            self.spans[first] = evict(cache, self.spans[first], range(first, following), dropped)

    def _record(self, layer: int) -> None:
        assert self.prompt is not None
        prompt = self.prompt
        prompt.trace.inside[layer] = (prompt.origin >= 0).sum(1).tolist()
        for number, (item, trace) in enumerate(zip(prompt.items, prompt.trace.items, strict=True)):
            row = item.row
            alive = (prompt.tracked.item[row] == number) & (prompt.tracked.patch[row] >= 0) & prompt.real[row]
            trace.decoder[layer] = prompt.tracked.patch[row][alive]

    def _open_span(self, layer: int) -> None:
        """From this layer on the cache holds what the present batch holds."""
        assert self.prompt is not None
        before = self._earlier_span(layer)
        removed = self._removed + (0 if before is None else before.removed)
        offset = None if before is None else before.offset
        if self._shift is not None:
            offset = self._shift if offset is None else offset + self._shift
        keys, present = self.prompt.keys(layer), self.prompt.present
        past = keys.shape[1] - present.shape[1]
        numbers = torch.full((present.shape[0], past), -1) if before is None else before.numbers(past)
        self.spans[layer] = Span(keys, removed, offset, torch.cat((numbers, present), 1))

    def _earlier_span(self, layer: int) -> Span | None:
        known = [first for first in self._earlier if first <= layer]
        return self._earlier[max(known)] if known else None

    def _aligned(
        self, layer: int, compaction: Compaction, hidden: Tensor, kwargs: dict[str, Any], renumber: bool
    ) -> dict[str, Any]:
        """Mask, rotary tables and positions for the shortened batch."""
        assert self.prompt is not None
        prompt, batch = self.prompt, hidden.shape[0]
        tables = tuple(
            gather_sequence(table.expand(batch, -1, -1), compaction.index) for table in kwargs["position_embeddings"]
        )
        before = prompt.positions
        if before is not None:
            prompt.positions = gather_positions(before, compaction.index)
            if renumber:
                prompt.positions = renumbered(before, compaction)
                shift = (before.amax(1, keepdim=True) - prompt.positions.amax(1, keepdim=True)).cpu()
                self._shift = shift if self._shift is None else self._shift + shift
                offset = self._earlier_offset(layer)
                tables = shifted_tables(self.text_model, prompt.positions, 0 if offset is None else offset, hidden)
        self._open_span(layer)
        cache = cache_of(kwargs)
        swap = {
            "attention_mask": causal_mask(self.config, hidden, self.spans[layer].real, cache, layer),
            "position_embeddings": tables,
            "position_ids": None,
        }
        positions = kwargs.get("position_ids")
        if positions is not None and not self._packs_by_position:
            swap["position_ids"] = prompt.positions if renumber else gather_positions(positions, compaction.index)
        return swap

    def _realign(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """A layer whose cache was cut by an earlier turn but is not cut in this one."""
        assert self.prompt is not None
        self._open_span(layer)
        span, cache = self.spans[layer], cache_of(kwargs)
        self._swap["attention_mask"] = causal_mask(self.config, hidden, span.real, cache, layer)
        offset = self._earlier_offset(layer)
        if offset is not None and self.prompt.positions is not None:
            self._swap["position_embeddings"] = shifted_tables(self.text_model, self.prompt.positions, offset, hidden)

    def _earlier_offset(self, layer: int) -> Tensor | None:
        """How much lower earlier turns made a layer count; what this prompt changes is in its own positions."""
        before = self._earlier_span(layer)
        return None if before is None else before.offset

    @property
    def _packs_by_position(self) -> bool:
        return "flash" in str(getattr(self.config, "_attn_implementation", ""))

    @property
    def skips_masks(self) -> bool:
        """Whether the attention kernel runs without a mask where every key is visible."""
        kernel = str(getattr(self.config, "_attn_implementation", ""))
        return "sdpa" in kernel or "flash" in kernel


def _collect(methods: Sequence[Method], facts: HostFacts) -> dict[Cut, tuple[int, Method]]:
    """Cuts of all methods -> number and method."""
    acting = [(number, method) for number, method in enumerate(methods) if method.retention < 1.0]
    return {cut: (number, method) for number, method in acting for cut in method.decoder_cuts(facts)}


def _left_out(places: Tensor, plan: Plan | None) -> Tensor:
    """Places of the visual tokens that a plan leaves out."""
    if plan is None:
        return places[:0]
    gone = torch.ones(places.numel(), dtype=torch.bool)
    gone[plan.keep] = False
    return places[gone]
