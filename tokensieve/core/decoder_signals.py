"""What methods may know of a decoder layer, recomputed for a few rows from queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.errors import HostError
from tokensieve.hosts.base import Host
from tokensieve.ops.attention import query_attention
from tokensieve.ops.token_transition import token_transition

LAST = "decoder.last_query_attention"
TEXT = "decoder.text_attention"
NEXT_LAST = "decoder.next_last_query_attention"
BIAS = "decoder.position_bias"
NEXT_TEXT = "decoder.next_text_attention"
TRANSITION = "decoder.transition"
KEYS = "decoder.keys"
NORMED = "decoder.normed_states"
VISUAL = "decoder.visual_attention"
LIKENESS = "decoder.value_likeness"
LENGTH = "decoder.value_length"


@dataclass
class RowView:
    """Where things stand in one row of the present batch.

    Attributes
    ----------
    visual : Tensor [n]
        Positions of the visual patch tokens.
    behind : Tensor [T]
        Positions of the text tokens behind the last visual token.
    last
        Position of the last real token.
    keys : Tensor [P + L]
        Padding mask of the keys that the row attends to.
    """

    visual: Tensor
    behind: Tensor
    last: int
    keys: Tensor


@dataclass
class DecoderSignals:
    """Collects the requested signals in front of the cuts of one prefill.

    Attributes
    ----------
    rows
        Called for a layer, gives the `RowView` of every row.
    """

    host: Host
    text_model: Any
    layers: Sequence[Any]
    wanted: dict[int, set[str]]
    rows: Callable[[int], list[RowView]]
    clock: Callable[[str], Any]
    _found: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)
    _moved: dict[int, list[Tensor]] = field(default_factory=dict)

    def listen(self) -> list[Any]:
        """Hooks on the attention of the layers in front of the cuts, and on the layers whose transitions count."""
        hooks = [
            self.layers[cut - 1].self_attn.register_forward_hook(self._hook(cut), with_kwargs=True)
            for cut in self.wanted
        ]
        names = {name for wanted in self.wanted.values() for name in wanted if name.startswith(f"{TRANSITION}@")}
        for layer in sorted(int(name.partition("@")[2]) for name in names):
            for part in (self.layers[layer].self_attn, self.layers[layer].mlp):
                hooks.append(part.register_forward_hook(self._transition_hook(layer), with_kwargs=True))
        return hooks

    def forget(self) -> None:
        """Drop what the last prefill left."""
        self._found, self._moved = {}, {}

    def read(
        self, cut: int, row: int, hidden: Tensor, tables: tuple[Tensor, Tensor], cache: Any = None
    ) -> dict[str, Tensor]:
        """Signals of one row at a cut.

        Parameters
        ----------
        hidden : Tensor [B, L, D]
            States in front of layer ``cut``.
        tables
            Rotary tables of that layer, [B or 1, L, d].
        cache
            The model's cache, for what layer ``cut`` holds of earlier turns.
        """
        found = dict(self._found.get(cut, [{}] * hidden.shape[0])[row])
        wanted, view = self.wanted[cut], self.rows(cut)[row]
        if NEXT_LAST in wanted:
            layer = self.layers[cut]
            normed = layer.input_layernorm(hidden[row : row + 1])
            rows = torch.tensor([view.last])
            attention = self._attention(layer.self_attn, normed, _row(tables, row), rows, view.keys, cache, row, True)
            found[NEXT_LAST] = attention.mean(0)[0, _columns(view, hidden)]
        if NEXT_TEXT in wanted:
            layer = self.layers[cut]
            normed = layer.input_layernorm(hidden[row : row + 1])
            attention = self._attention(
                layer.self_attn, normed, _row(tables, row), view.behind, view.keys, cache, row, True
            )
            found[NEXT_TEXT] = attention.mean(0)[:, _columns(view, hidden)]
        last_cut = max((other for other in self.wanted if other < cut), default=0)
        for layer in range(last_cut, cut):
            if f"{TRANSITION}@{layer}" in wanted:
                found[f"{TRANSITION}@{layer}"] = self._moved[layer][row]
        if NORMED in wanted:
            places = torch.cat((view.visual, view.behind)).to(hidden.device)
            found[NORMED] = self.text_model.norm(hidden[row].index_select(0, places))
        return found

    def _hook(self, cut: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
            views = self.rows(cut - 1)
            if not views:
                return
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            with torch.no_grad(), self.clock("compress"):
                self._found[cut] = [
                    self._behind_layer(cut, row, view, module, hidden, kwargs) for row, view in enumerate(views)
                ]

        return hook

    def _transition_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
            views = self.rows(layer)
            if not views:
                return
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after = result[0] if isinstance(result, tuple) else result
            with torch.no_grad(), self.clock("compress"):
                moved = [self._transition(before[row], after[row], view) for row, view in enumerate(views)]
            known = self._moved.get(layer)
            # The first part of the layer that reports is its attention; what the MLP does is added to it.
            self._moved[layer] = moved if known is None else [a + b for a, b in zip(known, moved, strict=True)]

        return hook

    @staticmethod
    def _transition(before: Tensor, after: Tensor, view: RowView) -> Tensor:
        """Transition [n] of the visual tokens of a row [L, D], relative to all its real tokens."""
        real = view.keys[-before.shape[0] :].nonzero()[:, 0].to(before.device)
        values = token_transition(before.index_select(0, real), after.index_select(0, real))
        spread = values.new_zeros(before.shape[0])
        spread[real] = values
        return spread[view.visual.to(spread.device)]

    def _behind_layer(
        self, cut: int, row: int, view: RowView, module: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        wanted = self.wanted[cut]
        found: dict[str, Tensor] = {}
        if view.visual.numel() == 0:
            return found
        tables, cache = _row(kwargs["position_embeddings"], row), kwargs.get("past_key_values")
        columns = _columns(view, hidden)
        one = hidden[row : row + 1]
        if LAST in wanted:
            rows = torch.tensor([view.last])
            attention = self._attention(module, one, tables, rows, view.keys, cache, row)
            found[LAST] = attention.mean(0)[0, columns]
        if TEXT in wanted:
            attention = self._attention(module, one, tables, view.behind, view.keys, cache, row)
            found[TEXT] = attention[:, :, columns]
        if BIAS in wanted:
            found[BIAS] = self._position_bias(module, tables, view)
        if VISUAL in wanted:
            attention = self._attention(module, one, tables, torch.tensor([view.last]), view.keys, cache, row)
            alone = attention[:, 0, columns]
            found[VISUAL] = (alone / alone.sum(-1, keepdim=True)).mean(0)
        if LIKENESS in wanted or LENGTH in wanted:
            places = torch.cat((view.visual, torch.tensor([view.last]))).to(hidden.device)
            values = _project(module, "v", one.index_select(1, places))[0].float()
            scores = (values[:, :-1] @ values[:, -1:].transpose(1, 2)).squeeze(2) * module.head_dim**-0.5
            found[LIKENESS] = scores.softmax(-1).mean(0)
            found[LENGTH] = values[:, :-1].mean(0).abs().sum(-1)
        if KEYS in wanted:
            keys = self._keys(module, one, tables, view.keys, cache, row)
            past = view.keys.numel() - hidden.shape[1]
            if past == 0:
                keys = self._from_first(module, keys, tables, int(view.keys.long().argmax()))
            places = (torch.cat((view.visual, view.behind)) + past).to(keys.device)
            found[KEYS] = keys[0].transpose(0, 1).flatten(1).index_select(0, places)
        return found

    def _from_first(self, module: Any, keys: Tensor, tables: tuple[Tensor, Tensor], first: int) -> Tensor:
        """Rotated keys as if the row began at its first real token, so that padding in front changes nothing.

        Turning all keys of a row back by the angle of that token leaves attention as it is, but not their norms.
        """
        cos, sin = (table[:, first : first + 1].to(keys.device) for table in tables)
        square = (cos.float().square() + sin.float().square()).mean()
        turned, _ = self.host.decoder_rotary(module)(keys, keys, cos, -sin)
        return turned / square.to(keys)

    def _position_bias(self, module: Any, tables: tuple[Tensor, Tensor], view: RowView) -> Tensor:
        """Scaled products [T, n] of vectors of ones rotated to the positions of text and visual tokens."""
        cos, sin = (table.float() for table in tables)
        ones = cos.new_ones(1, 1, cos.shape[1], module.head_dim)
        rotated, _ = self.host.decoder_rotary(module)(ones, ones, cos, sin)
        text, visual = (rotated[0, 0].index_select(0, places.to(cos.device)) for places in (view.behind, view.visual))
        return text @ visual.T * module.scaling

    def _attention(
        self,
        module: Any,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor],
        rows: Tensor,
        keys: Tensor,
        cache: Any,
        row: int,
        ahead: bool = False,
    ) -> Tensor:
        """Attention [H, r, P + L] of some queries of one row ``hidden [1, L, D]``, float32; see `_keys`."""
        places = rows.to(hidden.device)
        cos, sin = (table.index_select(1, places.to(table.device)) for table in tables)
        q = _project(module, "q", hidden.index_select(1, places))
        q, _ = self.host.decoder_rotary(module)(q, q, cos, sin)
        k = self._keys(module, hidden, tables, keys, cache, row, ahead)
        past = keys.numel() - hidden.shape[1]
        visible = keys[None] & (torch.arange(keys.numel())[None] <= past + rows[:, None])
        return query_attention(q, k, visible[None].to(k.device), scale=module.scaling)[0]

    def _keys(
        self,
        module: Any,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor],
        keys: Tensor,
        cache: Any,
        row: int,
        ahead: bool = False,
    ) -> Tensor:
        """Rotated keys [1, H_kv, P + L, d] of one row: from the cache where it holds them, or projected again.

        ``ahead`` tells that the layer has not run yet, so that its cache holds earlier turns at most.
        """
        cached = None if ahead else _cached_keys(cache, module.layer_idx, keys.numel())
        if cached is not None:
            return cached[row : row + 1]
        k = _project(module, "k", hidden)
        k = self.host.decoder_rotary(module)(k, k, *tables)[1]
        past = keys.numel() - hidden.shape[1]
        if past == 0:
            return k
        before = _cached_keys(cache, module.layer_idx, past)
        if before is None:
            raise HostError(
                "The cache does not give out the keys of earlier turns in full precision, which this method ranks "
                "by; use a DynamicCache, or start the conversation anew."
            )
        return torch.cat((before[row : row + 1].to(k), k), dim=2)


def _columns(view: RowView, hidden: Tensor) -> Tensor:
    """Key columns of the visual tokens."""
    return (view.visual + view.keys.numel() - hidden.shape[1]).to(hidden.device)


def _row(tables: tuple[Tensor, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """Rotary tables of one row, [1, L, d]."""
    cos, sin = (table if table.shape[0] == 1 else table[row : row + 1] for table in tables)
    return cos, sin


def _project(attention: Any, part: str, hidden: Tensor) -> Tensor:
    """Queries or keys [B, heads, length, d] of some states, behind the per-head norm where there is one."""
    projected = getattr(attention, f"{part}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
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
