"""Cutting the sequence between two decoder layers, and keeping every later layer aligned with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.compactor import Compaction, gather_positions, gather_sequence, pad_rows
from tokensieve.core.ledger import Ledger, Span
from tokensieve.core.masks import causal_mask
from tokensieve.core.method import Method
from tokensieve.core.plan import Plan
from tokensieve.core.prefill import PromptItem, Tracked
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.core.trace import PrefillTrace
from tokensieve.hosts.base import Host
from tokensieve.ops.attention import last_query_attention


@dataclass
class Prompt:
    """The batch as it runs through the decoder in one prefill.

    Attributes
    ----------
    real : Tensor [B, L]
        Padding mask of the present sequence.
    pasts : dict
        First decoder layer -> padding mask [B, P] of the cache entries in front of the sequence, from that
        layer on; layer 0 is always present.
    tracked : Tracked
        Origin of every present token.
    items
        Visual items of the batch.
    """

    real: Tensor
    pasts: dict[int, Tensor]
    tracked: Tracked
    items: list[PromptItem]
    trace: PrefillTrace

    def keys(self, layer: int) -> Tensor:
        """Padding mask [B, P + L] of the keys that a decoder layer sees."""
        past = self.pasts[max(first for first in self.pasts if first <= layer)]
        return torch.cat((past, self.real), 1)


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
        self.config = host.text_model(base).config
        self.cuts: dict[int, list[tuple[int, Method]]] = {}
        for number, method in enumerate(methods):
            for layer in method.decoder_layers(facts):
                if method.retention < 1.0:
                    self.cuts.setdefault(layer, []).append((number, method))
        self.prompt: Prompt | None = None
        self.spans: dict[int, Span] = {}
        self.removed: dict[int, int] = {}
        self._cut_away = 0
        self._attention: dict[int, Tensor] = {}
        self._swap: dict[str, Any] = {}
        self._step: tuple[Ledger, int, Tensor | None] | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Install the hooks."""
        for cut in self.cuts:
            attention = self.layers[cut - 1].get_submodule("self_attn")
            self._handles.append(attention.register_forward_hook(self._read_row(cut), with_kwargs=True))
        for index, layer in enumerate(self.layers):
            hook = self._before_layer(index)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.end()

    def begin(self, prompt: Prompt, removed: int, earlier: dict[int, int]) -> None:
        """A prefill with visual tokens is about to run.

        Parameters
        ----------
        prompt
            The batch, already shortened by the tokens stage.
        removed
            How many tokens that stage removed.
        earlier
            First decoder layer -> tokens of earlier turns that the cache does not hold from that layer on.
        """
        self.prompt = prompt
        self.removed = {first: earlier.get(first, 0) + removed for first in prompt.pasts}
        self.spans = {0: Span(prompt.keys(0), self.removed[0])}
        self._cut_away = 0

    def step(self, ledger: Ledger, given: Tensor | None) -> None:
        """A pass without new visual tokens is about to run on a compacted cache."""
        self._step = (ledger, -1, given)

    def end(self) -> None:
        """Forget the pass."""
        self.prompt, self._step = None, None
        self._swap, self._attention = {}, {}

    def _read_row(self, cut: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
            if self.prompt is None:
                return
            with torch.no_grad(), self.clock("compress"):
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                self._attention[cut] = self._last_row(module, hidden, kwargs)

        return hook

    def _last_row(self, attention: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Attention [B, P + L] of each row's last real token, mean over heads, float32."""
        assert self.prompt is not None
        prompt = self.prompt
        width = prompt.real.shape[1]
        last = (width - 1 - prompt.real.flip(1).long().argmax(1))[:, None]
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        cos, sin = kwargs["position_embeddings"]
        cos, sin = (table.expand(hidden.shape[0], -1, -1) for table in (cos, sin))
        rotate = self.host.decoder_rotary(attention)
        q = _project(attention, "q", gather_sequence(hidden, last), (*shape[:1], 1, *shape[2:]))
        q, _ = rotate(q, q, gather_sequence(cos, last), gather_sequence(sin, last))
        real = prompt.keys(attention.layer_idx)
        k = _cached_keys(kwargs.get("past_key_values"), attention.layer_idx, real.shape[1])
        if k is None:
            k = _project(attention, "k", hidden, shape)
            _, k = rotate(k, k, cos, sin)
        return last_query_attention(q, k, real.to(k.device), scale=attention.scaling)

    def _before_layer(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if self.prompt is not None:
                if self.hide_positions:
                    kwargs["position_ids"] = None
                hidden = args[0] if args else kwargs["hidden_states"]
                for number, method in self.cuts.get(index, ()):
                    with self.clock("compress"):
                        hidden = self._cut(index, number, method, hidden, {**kwargs, **self._swap})
                if index > 0 and index in self.prompt.pasts and index not in self.cuts:
                    self._realign(index, hidden, kwargs)
                kwargs.update(_on(self._swap, hidden.device))
                if args:
                    return (hidden, *args[1:]), kwargs
                kwargs["hidden_states"] = hidden
                return args, kwargs
            if self._step is not None:
                self._align_step(index, args[0] if args else kwargs["hidden_states"], kwargs)
                return args, kwargs
            return None

        return hook

    def _cut(self, layer: int, number: int, method: Method, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Shorten the batch in front of a layer and remember what the layers from here on must be given."""
        assert self.prompt is not None
        prompt = self.prompt
        rows, replaced = [], []
        for row in range(hidden.shape[0]):
            order, spots, features = self._plan_row(row, layer, number, method, hidden)
            rows.append(order)
            replaced.append((spots, features))
        left = bool(prompt.real[:, -1].all())
        compaction = pad_rows(rows, prompt.real.shape[1], left)
        shorter = gather_sequence(hidden, compaction.index)
        for row, (spots, features) in enumerate(replaced):
            if features is not None:
                places = (torch.isin(compaction.index[row], spots) & compaction.real[row]).nonzero().flatten()
                shorter = shorter.clone()
                shorter[row, places.to(shorter.device)] = features.to(shorter)
        self._advance(compaction)
        self._record(layer)
        self._cut_away += compaction.removed
        self._open_span(layer)
        self._swap = self._aligned(compaction, shorter, kwargs)
        return shorter

    def _open_span(self, layer: int) -> None:
        """From this layer on the cache holds fewer tokens than before it."""
        assert self.prompt is not None
        first = max(known for known in self.removed if known <= layer)
        self.spans[layer] = Span(self.prompt.keys(layer), self.removed[first] + self._cut_away)

    def _realign(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """A layer whose cache was cut by an earlier turn but is not cut in this one."""
        self._open_span(layer)
        cache = kwargs.get("past_key_values")
        self._swap["attention_mask"] = causal_mask(self.config, hidden, self.spans[layer].real, cache, layer)

    def _plan_row(
        self, row: int, layer: int, number: int, method: Method, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Surviving positions of one row, ascending, with replaced positions and their states."""
        assert self.prompt is not None
        prompt = self.prompt
        present = prompt.real[row].nonzero().flatten()
        visual = ((prompt.tracked.patch[row] >= 0) & prompt.real[row]).nonzero().flatten()
        if visual.numel() == 0:
            return present, visual, None
        sample = self._sample(row, layer, number, method, hidden, visual)
        plan: Plan = method.plan_decoder(sample).checked(visual.numel(), method.name)
        order = plan.keep.sort().indices
        kept = visual[plan.keep[order]]
        dropped = torch.zeros(prompt.real.shape[1], dtype=torch.bool)
        dropped[visual] = True
        dropped[kept] = False
        features = None if plan.features is None else plan.features[order.to(plan.features.device)]
        return present[~dropped[present]], kept, features

    def _sample(
        self, row: int, layer: int, number: int, method: Method, hidden: Tensor, visual: Tensor
    ) -> DecoderSample:
        assert self.prompt is not None
        prompt = self.prompt
        items = [(i, item) for i, item in enumerate(prompt.items) if item.row == row]
        item_of = prompt.tracked.item[row, visual]
        view = torch.zeros_like(visual)
        entered, base, budget = 0, 0, []
        local = torch.zeros_like(visual)
        for order, (i, item) in enumerate(items):
            layout = item.encoded.layout
            mine = item_of == i
            local[mine] = order
            view[mine] = layout.patch_view[prompt.tracked.patch[row, visual[mine]]] + base
            entered += layout.patches
            base += len(layout.views)
            if number in item.budgets:
                counts = torch.zeros(len(layout.views), dtype=torch.long)
                kept = item.encoded.frames_kept
                counts[slice(None) if kept is None else kept] = item.budgets[number]
                budget.append(counts)
        attention = self._attention[layer][row]
        past = attention.shape[0] - prompt.real.shape[1]
        return DecoderSample(
            hidden=hidden[row].index_select(0, visual.to(hidden.device)),
            attention=attention.index_select(0, (visual + past).to(attention.device)),
            layer=layer,
            entered=entered,
            view=view,
            item=local,
            budget=torch.cat(budget) if budget else None,
            facts=self.facts,
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

    def _aligned(self, compaction: Compaction, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask, rotary tables and positions for the shortened batch."""
        layer = max(self.spans)
        real = self.spans[layer].real
        cos, sin = kwargs["position_embeddings"]
        batch = hidden.shape[0]
        swap: dict[str, Any] = {
            "attention_mask": causal_mask(self.config, hidden, real, kwargs.get("past_key_values"), layer),
            "position_embeddings": tuple(
                gather_sequence(table.expand(batch, -1, -1), compaction.index) for table in (cos, sin)
            ),
            "position_ids": None,
        }
        positions = kwargs.get("position_ids")
        if positions is not None and not self._packs_by_position:
            swap["position_ids"] = gather_positions(positions, compaction.index)
        return swap

    @property
    def _packs_by_position(self) -> bool:
        return "flash" in str(getattr(self.config, "_attn_implementation", ""))

    def _align_step(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Give a layer behind a cut the mask of its own, shorter cache."""
        assert self._step is not None
        ledger, built_for, given = self._step
        first = max(layer for layer in ledger.spans if layer <= index)
        if first == 0:
            return
        if built_for != first:
            span = ledger.spans[first]
            cache = kwargs["past_key_values"]
            mask = span.mask(int(cache.layers[first].get_seq_length()) + hidden.shape[1], given)
            self._swap = {"attention_mask": causal_mask(self.config, hidden, mask, cache, first)}
            self._step = (ledger, first, given)
        kwargs.update(_on(self._swap, hidden.device))


def _project(attention: Any, part: str, hidden: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Queries or keys [B, heads, length, d] of some states, behind the per-head norm where there is one."""
    projected = getattr(attention, f"{part}_proj")(hidden).view(shape)
    norm = getattr(attention, f"{part}_norm", None)
    return (projected if norm is None else norm(projected)).transpose(1, 2)


def _cached_keys(cache: Any, layer: int, length: int) -> Tensor | None:
    """Rotated keys of a layer from its cache, or None when the cache does not hold them in full precision."""
    if cache is None or len(cache.layers) <= layer:
        return None
    keys = getattr(cache.layers[layer], "keys", None)
    if not isinstance(keys, Tensor) or keys.shape[-2] < length:
        return None
    return keys[..., :length, :]


def _on(swap: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The replaced arguments on the device of the layer that is about to run."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(move(part) for part in value) if isinstance(value, tuple) else value

    return {key: move(value) for key, value in swap.items()}
