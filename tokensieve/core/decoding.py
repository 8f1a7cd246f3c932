"""What passes behind a compressed prompt see of the cache, layer by layer.

Caches of different lengths need masks and positions of their own. A method may also let later layers attend to a
changing part of the cache in single-token steps; entries that are not chosen are masked for one step and may return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.cache import cache_of
from tokensieve.core.layer_attention import cached_keys, project, unreadable_cache
from tokensieve.core.ledger import Ledger
from tokensieve.core.masks import causal_mask, on_device, shifted_tables
from tokensieve.core.method import Method
from tokensieve.core.sample import HostFacts, StepSample
from tokensieve.hosts.base import Host
from tokensieve.ops.attention import query_attention


class DecodingStage:
    """Aligns every layer with its own cache, and chooses the visible visual entries of every decoding step.

    Parameters
    ----------
    host, text_model, layers, facts
        The model.
    methods
        Methods of the run; at most one may select cache entries.
    clock
        Called with a stage name; returns a context manager that times it.
    """

    def __init__(
        self,
        host: Host,
        text_model: Any,
        layers: Sequence[Any],
        facts: HostFacts,
        methods: Sequence[Method],
        clock: Callable[[str], Any],
    ) -> None:
        self.host, self.text_model, self.layers, self.facts, self.clock = host, text_model, layers, facts, clock
        acting = [(method, method.decoding_layer(facts)) for method in methods if method.retention < 1.0]
        chosen = [(method, layer) for method, layer in acting if layer is not None]
        self.method: Method | None = chosen[0][0] if chosen else None
        self.first = chosen[0][1] if chosen else len(layers)
        self._ledger: Ledger | None = None
        self._given: Tensor | None = None
        self._hidden: list[Tensor] | None = None
        self._pass: tuple[Ledger, Tensor | None, Tensor | None] | None = None
        self._swap: dict[str, Any] = {}
        self._built_for: tuple[int, bool] | None = None

    def listen(self) -> list[Any]:
        """A hook on the attention of the layer in front of those that see less."""
        if self.method is None:
            return []
        return [self.layers[self.first - 1].self_attn.register_forward_hook(self._measure, with_kwargs=True)]

    def begin(self, ledger: Ledger, given: Tensor | None, queries: int) -> bool:
        """A pass without new visual tokens is about to run; tells whether it is a step that may see less.

        Parameters
        ----------
        given : Tensor [B, total], optional
            Padding mask in tokens of the full conversation.
        queries
            Tokens of the pass; several at once are a new turn, which sees everything and starts afresh.
        """
        self.end()
        if self.method is None or queries > 1:
            ledger.memory = []
            return False
        self._ledger, self._given = ledger, given
        return True

    def step(self, ledger: Ledger, given: Tensor | None, positions: Tensor | None) -> None:
        """The pass needs masks or positions of some layers' own.

        Parameters
        ----------
        given : Tensor [B, total], optional
            Padding mask in tokens of the full conversation.
        positions : Tensor, optional
            Position ids of the pass in front of the first layer.
        """
        self._pass, self._built_for = (ledger, given, positions), None

    def end(self) -> None:
        """Forget the pass."""
        self._ledger = self._given = self._hidden = self._pass = None
        self._swap = {}

    def align(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Give a layer the mask of its own cache, or of what it may see of it, and its own positions.

        Returns whether there is anything to align in this pass.
        """
        if self._pass is None:
            return False
        ledger, given, positions = self._pass
        first = max(layer for layer in ledger.spans if layer <= index)
        span, hides = ledger.spans[first], self.hides(index)
        if first == 0 and span.offset is None and not hides:
            return True
        if self._built_for != (first, hides):
            cache = cache_of(kwargs)
            physical = int(cache.layers[index].get_seq_length()) + hidden.shape[1]
            mask = span.mask(physical, given)
            if hides:
                mask = self.visible(mask, span.numbers(physical))
            self._swap = {"attention_mask": causal_mask(self.text_model.config, hidden, mask, cache, first)}
            if span.offset is not None and positions is not None:
                self._swap["position_embeddings"] = shifted_tables(self.text_model, positions, span.offset, hidden)
            self._built_for = (first, hides)
        kwargs.update(on_device(self._swap, hidden.device))
        return True

    def hides(self, layer: int) -> bool:
        """Whether a layer sees less than its cache holds in this step."""
        return self._hidden is not None and layer >= self.first

    def visible(self, mask: Tensor, numbers: Tensor) -> Tensor:
        """The mask [B, K] of a layer's keys without what is hidden, by their visual numbers [B, K]."""
        assert self._hidden is not None
        gone = [torch.isin(numbers[row], hidden) for row, hidden in enumerate(self._hidden)]
        return mask & ~torch.stack(gone)

    def _measure(self, module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        ledger = self._ledger
        if ledger is None or self.method is None:
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with torch.no_grad(), self.clock("compress"):
            attention, mask, numbers = self._attention(ledger, module, hidden, kwargs)
            if not ledger.memory:
                ledger.memory = [{} for _ in range(hidden.shape[0])]
            found = []
            for row in range(hidden.shape[0]):
                places = ((numbers[row] >= 0) & mask[row]).nonzero().flatten()
                visible = None
                if places.numel():
                    seen = attention[row].index_select(0, places.to(attention.device))
                    visible = self.method.plan_step(StepSample(seen, ledger.memory[row], self.facts))
                found.append(numbers[row, places[:0] if visible is None else places[~visible.cpu()]])
        self._hidden = found if any(gone.numel() for gone in found) else None

    def _attention(
        self, ledger: Ledger, module: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of the token being decoded [B, K], mean over heads, padding mask and visual numbers [B, K]."""
        cache, index = cache_of(kwargs), self.first - 1
        physical = int(cache.layers[index].get_seq_length())
        span = ledger.span(index)
        mask, numbers = span.mask(physical, self._given), span.numbers(physical)
        k = cached_keys(cache, index, physical)
        if k is None:
            raise unreadable_cache()
        q = project(module, "q", hidden)
        q, _ = self.host.decoder_rotary(module)(q, q, *kwargs["position_embeddings"])
        attention = query_attention(q, k.to(q.device), mask[:, None].to(q.device), scale=module.scaling)
        return attention.mean(1)[:, 0], mask, numbers
