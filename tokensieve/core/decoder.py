"""Cutting the sequence between two decoder layers, and keeping every later layer aligned with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.compactor import (
    Compaction,
    Placement,
    arrange_row,
    gather_positions,
    gather_sequence,
    pad_rows,
    renumbered,
)
from tokensieve.core.decoder_signals import DecoderSignals, RowView
from tokensieve.core.ledger import Ledger, Span
from tokensieve.core.masks import causal_mask
from tokensieve.core.method import Method
from tokensieve.core.plan import Plan
from tokensieve.core.prefill import Tracked
from tokensieve.core.prompt_state import Prompt
from tokensieve.core.sample import DecoderSample, HostFacts, PromptSample
from tokensieve.errors import MethodError
from tokensieve.hosts.base import Host


class DecoderStage:
    """Hooks on the decoder layers of one model.

    Parameters
    ----------
    base, host, facts
        The model and what is known of it.
    methods
        Methods with a decoder stage, in order.
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
        hide_positions: bool,
        clock: Any,
    ) -> None:
        self.base, self.host, self.facts = base, host, facts
        self.clock = clock
        self.hide_positions = hide_positions
        self.layers = host.layers(base)
        self.text_model = host.text_model(base)
        self.config = self.text_model.config
        self.methods = [method for method in methods if method.retention < 1.0]
        self.cuts: dict[int, tuple[int, Method]] = {}
        for number, method in enumerate(methods):
            for layer in method.decoder_layers(facts) if method.retention < 1.0 else ():
                if layer in self.cuts:
                    raise MethodError(
                        f"{method.name} and {self.cuts[layer][1].name} both cut in front of layer {layer}; give one "
                        "of them another layer."
                    )
                self.cuts[layer] = (number, method)
        wanted = {layer: set(method.decoder_signals(facts)) for layer, (_, method) in self.cuts.items()}
        self.signals = DecoderSignals(host, self.text_model, list(self.layers), wanted, self._row_views, clock)
        self.prompt: Prompt | None = None
        self.spans: dict[int, Span] = {}
        self._earlier: dict[int, Span] = {}
        self._removed = 0
        self._shift: Tensor | None = None
        self._swap: dict[str, Any] = {}
        self._step: tuple[Ledger, Tensor | None, Tensor | None] | None = None
        self._built_for = -1
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Install the hooks."""
        self._handles = self.signals.listen()
        for index, layer in enumerate(self.layers):
            hook = self._before_layer(index)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

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
        self._removed, self._shift = removed, None
        self.spans = {}
        self._open_span(0)
        for number, method in self.cuts.values():
            for row in range(embeds.shape[0]):
                if (number, row) not in prompt.memory and prompt.visual(row).numel():
                    states = embeds[row]
                    places = (prompt.visual(row).to(states.device), prompt.behind(row).to(states.device))
                    sample = PromptSample(*(states.index_select(0, place) for place in places))
                    prompt.memory[number, row] = method.read_prompt(sample)

    def step(self, ledger: Ledger, given: Tensor | None, positions: Tensor | None) -> None:
        """A pass without new visual tokens is about to run on a compacted cache.

        Parameters
        ----------
        given : Tensor [B, total], optional
            Padding mask in tokens of the full conversation.
        positions : Tensor, optional
            Position ids of the pass in front of the first layer.
        """
        self._step, self._built_for = (ledger, given, positions), -1

    def end(self) -> None:
        """Forget the pass."""
        self.prompt, self._step = None, None
        self._swap = {}
        self.signals.forget()

    def _row_views(self, layer: int) -> list[RowView]:
        """Where things stand in every row of the present prefill; none outside of a prefill."""
        prompt = self.prompt
        if prompt is None:
            return []
        keys = prompt.keys(layer)
        return [
            RowView(prompt.visual(row), prompt.behind(row), prompt.last(row), keys[row])
            for row in range(prompt.real.shape[0])
        ]

    def _before_layer(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.prompt is not None:
                if self.hide_positions:
                    kwargs["position_ids"] = None
                if index in self.cuts:
                    with self.clock("compress"):
                        hidden = self._cut(index, hidden, {**kwargs, **self._swap})
                elif index in self._earlier and index > 0:
                    self._realign(index, hidden, kwargs)
                kwargs.update(_on(self._swap, hidden.device))
            elif self._step is not None:
                self._align_step(index, hidden, kwargs)
            else:
                return None
            if args:
                return (hidden, *args[1:]), kwargs
            kwargs["hidden_states"] = hidden
            return args, kwargs

        return hook

    def _cut(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Shorten the batch in front of a layer and remember what the layers from here on must be given."""
        assert self.prompt is not None
        prompt, offset = self.prompt, self._earlier_offset(layer)
        if offset is not None and prompt.positions is not None:
            kwargs["position_embeddings"] = self._shifted(prompt.positions, offset, hidden)
        rows, plans = [], []
        for row in range(hidden.shape[0]):
            visual = prompt.visual(row)
            plan = self._plan_row(row, layer, hidden, visual, kwargs) if visual.numel() else None
            plans.append(plan)
            kept = [] if plan is None else [Placement(visual, plan.keep)]
            rows.append(arrange_row(prompt.real[row], kept))
        compaction = pad_rows(rows, prompt.real.shape[1], bool(prompt.real[:, -1].all()))
        shorter = gather_sequence(hidden, compaction.index)
        for row, plan in enumerate(plans):
            if plan is not None and plan.features is not None:
                shorter = self._replace(shorter, row, prompt.visual(row)[plan.keep], plan.features, compaction)
        self._advance(compaction)
        self._record(layer)
        self._removed += compaction.removed
        renumber = any(plan is not None and plan.positions == "renumber" for plan in plans)
        self._swap = self._aligned(layer, compaction, shorter, kwargs, renumber)
        return shorter

    @staticmethod
    def _replace(hidden: Tensor, row: int, sources: Tensor, features: Tensor, compaction: Compaction) -> Tensor:
        """States of survivors that a method replaced; ``sources`` are their positions before the cut."""
        place = torch.full((compaction.length,), -1)
        real = compaction.real[row].nonzero().flatten()
        place[compaction.index[row, real]] = real
        hidden = hidden.clone()
        hidden[row, place[sources].to(hidden.device)] = features.to(hidden)
        return hidden

    def _plan_row(self, row: int, layer: int, hidden: Tensor, visual: Tensor, kwargs: dict[str, Any]) -> Plan:
        """The method's decision for one row."""
        _, method = self.cuts[layer]
        sample = self._sample(row, layer, hidden, visual, kwargs)
        plan = method.plan_decoder(sample).checked(visual.numel(), method.name)
        if self.facts.position_axes > 1:
            plan.positions = "original"
        return plan

    def _sample(self, row: int, layer: int, hidden: Tensor, visual: Tensor, kwargs: dict[str, Any]) -> DecoderSample:
        assert self.prompt is not None
        prompt = self.prompt
        number, _ = self.cuts[layer]
        item_of = prompt.tracked.item[row, visual]
        view, local = torch.zeros_like(visual), torch.zeros_like(visual)
        frames, budget = 0, []
        mine = [(i, item) for i, item in enumerate(prompt.items) if item.row == row]
        for order, (i, item) in enumerate(mine):
            layout, spots = item.encoded.layout, item_of == i
            local[spots] = order
            view[spots] = layout.patch_view[prompt.tracked.patch[row, visual[spots]]] + frames
            frames += len(layout.views)
            if number in item.budgets:
                counts = torch.zeros(len(layout.views), dtype=torch.long)
                kept = item.encoded.frames_kept
                counts[slice(None) if kept is None else kept] = item.budgets[number]
                budget.append(counts)
        return DecoderSample(
            hidden=hidden[row].index_select(0, visual.to(hidden.device)),
            layer=layer,
            entered=prompt.entered(row),
            view=view,
            item=local,
            signals=self.signals.read(layer, row, hidden, kwargs["position_embeddings"], kwargs.get("past_key_values")),
            memory=prompt.memory[number, row],
            budget=torch.cat(budget) if budget else None,
            facts=self.facts,
            uncompressed=torch.tensor([item.encoded.layout.patches for _, item in mine]),
        )

    def _advance(self, compaction: Compaction) -> None:
        assert self.prompt is not None
        prompt = self.prompt
        pick, pad = compaction.index, ~compaction.real
        prompt.tracked = Tracked(
            prompt.tracked.item.gather(1, pick).masked_fill(pad, -1),
            prompt.tracked.patch.gather(1, pick).masked_fill(pad, -1),
        )
        prompt.real = compaction.real

    def _record(self, layer: int) -> None:
        assert self.prompt is not None
        prompt = self.prompt
        for number, (item, trace) in enumerate(zip(prompt.items, prompt.trace.items, strict=True)):
            row = item.row
            alive = (prompt.tracked.item[row] == number) & (prompt.tracked.patch[row] >= 0)
            trace.decoder[layer] = prompt.tracked.patch[row][alive]

    def _open_span(self, layer: int) -> None:
        """From this layer on the cache holds what the present batch holds."""
        assert self.prompt is not None
        before = self._earlier_span(layer)
        removed = self._removed + (0 if before is None else before.removed)
        offset = None if before is None else before.offset
        if self._shift is not None:
            offset = self._shift if offset is None else offset + self._shift
        self.spans[layer] = Span(self.prompt.keys(layer), removed, offset)

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
                tables = self._shifted(prompt.positions, 0 if offset is None else offset, hidden)
        self._open_span(layer)
        cache = kwargs.get("past_key_values")
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
        span, cache = self.spans[layer], kwargs.get("past_key_values")
        self._swap["attention_mask"] = causal_mask(self.config, hidden, span.real, cache, layer)
        offset = self._earlier_offset(layer)
        if offset is not None and self.prompt.positions is not None:
            self._swap["position_embeddings"] = self._shifted(self.prompt.positions, offset, hidden)

    def _earlier_offset(self, layer: int) -> Tensor | None:
        """How much lower earlier turns made a layer count; what this prompt changes is in its own positions."""
        before = self._earlier_span(layer)
        return None if before is None else before.offset

    def _shifted(self, positions: Tensor, offset: Tensor | int, hidden: Tensor) -> Any:
        """Rotary tables for positions that these layers count lower."""
        lower = positions - (offset if isinstance(offset, int) else offset.to(positions.device))
        return self.text_model.rotary_emb(hidden, lower.to(hidden.device))

    @property
    def _packs_by_position(self) -> bool:
        return "flash" in str(getattr(self.config, "_attn_implementation", ""))

    @property
    def skips_masks(self) -> bool:
        """Whether the attention kernel runs without a mask where every key is visible."""
        kernel = str(getattr(self.config, "_attn_implementation", ""))
        return "sdpa" in kernel or "flash" in kernel

    def _align_step(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Give a layer behind a cut the mask of its own, shorter cache, and its own positions."""
        assert self._step is not None
        ledger, given, positions = self._step
        first = max(layer for layer in ledger.spans if layer <= index)
        if first == 0:
            return
        if self._built_for != first:
            span, cache = ledger.spans[first], kwargs["past_key_values"]
            mask = span.mask(int(cache.layers[first].get_seq_length()) + hidden.shape[1], given)
            self._swap = {"attention_mask": causal_mask(self.config, hidden, mask, cache, first)}
            if span.offset is not None and positions is not None:
                self._swap["position_embeddings"] = self._shifted(positions, span.offset, hidden)
            self._built_for = first
        kwargs.update(_on(self._swap, hidden.device))


def _on(swap: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The replaced arguments on the device of the layer that is about to run."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(move(part) for part in value) if isinstance(value, tuple) else value

    return {key: move(value) for key, value in swap.items()}
