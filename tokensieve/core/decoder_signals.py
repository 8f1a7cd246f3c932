"""What methods may know of a decoder layer, recomputed for a few rows from queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.cache import cache_of
from tokensieve.core.cuts import Cut
from tokensieve.core.layer_attention import LayerAttention, Tables, project, row_tables
from tokensieve.hosts.base import Host
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
EARLIER_LAST = "decoder.earlier_last_query_attention"
WALK = "decoder.attention_walk"
SHARES = "decoder.attention_shares"
STATES = "decoder.states"
TEXT_STATES = "decoder.text_states"


@dataclass
class RowView:
    """Where things stand in one row of the present batch.

    Attributes
    ----------
    visual : Tensor [n]
        Positions of the visual tokens that a method decides on.
    behind : Tensor [T]
        Positions of the text tokens behind the last visual token.
    text : Tensor [T']
        Positions of all text tokens.
    last
        Position of the last real token.
    keys : Tensor [P + L]
        Padding mask of the keys that the row attends to.
    rows : Tensor [R]
        Positions of all tokens that are no padding, those among them that nobody attends to included.
    total
        Tokens of the row in front of the first layer.
    """

    visual: Tensor
    behind: Tensor
    text: Tensor
    last: int
    keys: Tensor
    rows: Tensor
    total: int


@dataclass
class DecoderSignals:
    """Collects the requested signals at the cuts of one prefill.

    Attributes
    ----------
    rows
        Called for a cut and a layer whose keys count, gives the `RowView` of every row; None for rows in which the
        method does not act.
    """

    host: Host
    text_model: Any
    layers: Sequence[Any]
    wanted: dict[Cut, set[str]]
    rows: Callable[[Cut, int], list[RowView | None]]
    clock: Callable[[str], Any]
    _found: dict[Cut, list[dict[str, Tensor]]] = field(default_factory=dict)
    _moved: dict[int, list[Tensor]] = field(default_factory=dict)

    def listen(self) -> list[Any]:
        """Hooks on the attention of the layers before the cuts, and on the layers whose transitions count."""
        hooks = []
        for cut, wanted in self.wanted.items():
            if cut.attention >= 0 and wanted & _ATTENDED:
                hooks.append(self._listen_attention(cut, cut.attention, self._behind_layer))
            if cut.attention >= 1 and EARLIER_LAST in wanted:
                hooks.append(self._listen_attention(cut, cut.attention - 1, self._behind_earlier_layer))
        names = {name for wanted in self.wanted.values() for name in wanted if name.startswith(f"{TRANSITION}@")}
        for layer in sorted(int(name.partition("@")[2]) for name in names):
            for part in (self.layers[layer].self_attn, self.layers[layer].mlp):
                hooks.append(part.register_forward_hook(self._transition_hook(layer), with_kwargs=True))
        return hooks

    def forget(self) -> None:
        """Drop what the last prefill left."""
        self._found, self._moved = {}, {}

    def read(self, cut: Cut, row: int, hidden: Tensor, tables: Tables, cache: Any = None) -> dict[str, Tensor]:
        """Signals of one row at a cut.

        Parameters
        ----------
        hidden : Tensor [B, L, D]
            States at the cut.
        tables
            Rotary tables of the layer of the cut, [B or 1, L, d].
        cache
            The model's cache, for what that layer holds of earlier turns.
        """
        found = dict(self._found[cut][row]) if cut in self._found else {}
        wanted, view = self.wanted[cut], self.rows(cut, cut.layer)[row]
        assert view is not None
        if wanted & {NEXT_LAST, NEXT_TEXT}:
            layer = self.layers[cut.layer]
            normed = layer.input_layernorm(hidden[row : row + 1])
            ahead = LayerAttention(
                self.host, layer.self_attn, normed, row_tables(tables, row), view.keys, cache, row, True
            )
            columns = _columns(view, hidden)
            if NEXT_LAST in wanted:
                found[NEXT_LAST] = ahead.of(torch.tensor([view.last])).mean(0)[0, columns]
            if NEXT_TEXT in wanted:
                found[NEXT_TEXT] = ahead.of(view.behind).mean(0)[:, columns]
        last_cut = max((other.layer for other in self.wanted if other.layer < cut.layer), default=0)
        for index in range(last_cut, cut.layer):
            if f"{TRANSITION}@{index}" in wanted:
                found[f"{TRANSITION}@{index}"] = self._moved[index][row]
        places = torch.cat((view.visual, view.behind)).to(hidden.device)
        if NORMED in wanted:
            found[NORMED] = self.text_model.norm(hidden[row].index_select(0, places))
        if STATES in wanted:
            found[STATES] = hidden[row].index_select(0, places)
        if TEXT_STATES in wanted:
            found[TEXT_STATES] = hidden[row].index_select(0, view.text.to(hidden.device))
        return found

    def _listen_attention(
        self, cut: Cut, index: int, read: Callable[[Cut, RowView, LayerAttention], dict[str, Tensor]]
    ) -> Any:
        """A hook on the attention of a layer that adds what ``read`` finds to the signals of a cut."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
            views = self.rows(cut, index)
            if not any(view is not None for view in views):
                return
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            tables, cache = kwargs["position_embeddings"], cache_of(kwargs)
            with torch.no_grad(), self.clock("compress"):
                found = self._found.setdefault(cut, [{} for _ in views])
                for row, view in enumerate(views):
                    if view is not None and view.visual.numel():
                        one = hidden[row : row + 1]
                        layer = LayerAttention(self.host, module, one, row_tables(tables, row), view.keys, cache, row)
                        found[row].update(read(cut, view, layer))

        return self.layers[index].self_attn.register_forward_hook(hook, with_kwargs=True)

    def _transition_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
            views = self.rows(Cut(layer), layer)
            if not views:
                return
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after = result[0] if isinstance(result, tuple) else result
            with torch.no_grad(), self.clock("compress"):
                moved = [
                    before.new_zeros(0) if view is None else self._transition(before[row], after[row], view)
                    for row, view in enumerate(views)
                ]
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

    @staticmethod
    def _behind_earlier_layer(cut: Cut, view: RowView, layer: LayerAttention) -> dict[str, Tensor]:
        attention = layer.of(torch.tensor([view.last]))
        return {EARLIER_LAST: attention.mean(0)[0, _columns(view, layer.hidden)]}

    def _behind_layer(self, cut: Cut, view: RowView, layer: LayerAttention) -> dict[str, Tensor]:
        wanted, module = self.wanted[cut], layer.module
        columns = _columns(view, layer.hidden)
        found: dict[str, Tensor] = {}
        if wanted & {LAST, VISUAL}:
            attention = layer.of(torch.tensor([view.last]))[:, 0, columns]
            if LAST in wanted:
                found[LAST] = attention.mean(0)
            if VISUAL in wanted:
                found[VISUAL] = (attention / attention.sum(-1, keepdim=True)).mean(0)
        if TEXT in wanted:
            found[TEXT] = layer.of(view.behind)[:, :, columns]
        if BIAS in wanted:
            found[BIAS] = self._position_bias(module, layer.tables, view)
        if WALK in wanted:
            found[WALK] = layer.walk(view.rows, view.total)[view.visual.to(columns.device)]
        if SHARES in wanted:
            found[SHARES] = self._shares(view, layer)
        if wanted & {LIKENESS, LENGTH}:
            places = torch.cat((view.visual, torch.tensor([view.last]))).to(layer.hidden.device)
            values = project(module, "v", layer.hidden.index_select(1, places))[0].float()
            scores = (values[:, :-1] @ values[:, -1:].transpose(1, 2)).squeeze(2) * module.head_dim**-0.5
            found[LIKENESS] = scores.softmax(-1).mean(0)
            found[LENGTH] = values[:, :-1].mean(0).abs().sum(-1)
        if KEYS in wanted:
            keys = layer.keys()
            if layer.past == 0:
                keys = self._from_first(module, keys, layer.tables, int(view.keys.long().argmax()))
            places = (torch.cat((view.visual, view.behind)) + layer.past).to(keys.device)
            found[KEYS] = keys[0].transpose(0, 1).flatten(1).index_select(0, places)
        return found

    @staticmethod
    def _shares(view: RowView, layer: LayerAttention) -> Tensor:
        """Attention of text to visual tokens and of visual tokens to text, behind the first visual token [2]."""
        text = view.text[view.text > view.visual[0]]
        late = view.visual[view.visual > text[0]] if text.numel() else text
        # Visual tokens in front of all that text have rows too, but see none of it.
        seen = layer.share(late, text) * late.numel() / view.visual.numel()
        return torch.tensor([layer.share(text, view.visual), seen])

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


def _columns(view: RowView, hidden: Tensor) -> Tensor:
    """Key columns of the visual tokens."""
    return (view.visual + view.keys.numel() - hidden.shape[1]).to(hidden.device)


_ATTENDED = {LAST, TEXT, BIAS, VISUAL, LIKENESS, LENGTH, KEYS, WALK, SHARES}
"""Signals of the layer in front of a cut."""
