"""Shortening the sequence between attention and feed-forward part of one decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokensieve.errors import HostError

Shorten = Callable[[Tensor, dict[str, Any]], Tensor | None]


class FeedHooks:
    """Hooks on the second half of a layer.

    The layer adds the output of its feed-forward part to states of the length before. It is handed a zero instead,
    and its own output is replaced by the shortened states plus the update.

    Parameters
    ----------
    layer
        A decoder layer with ``post_attention_layernorm`` and ``mlp``, both of which run on what attention left.

    Attributes
    ----------
    arguments
        Keyword arguments that the layer runs with.

    Raises
    ------
    HostError
        If the layer is built in another way.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.arguments: dict[str, Any] = {}
        self._states: Tensor | None = None
        self._update: Tensor | None = None
        children = dict(layer.named_children())
        if not {"post_attention_layernorm", "mlp"} <= set(children) or len(children) != 4:
            raise HostError(
                f"{type(layer).__name__} is not built of attention, MLP and a norm in front of each, so that nothing "
                "can be cut in between; use a method that cuts in front of layers."
            )
        self.norm, self.mlp = children["post_attention_layernorm"], children["mlp"]

    def attach(self, shorten: Shorten) -> list[Any]:
        """Install the hooks.

        Parameters
        ----------
        shorten
            Given the states behind attention [B, L, D] and the arguments of the layer, gives shorter states or None.
        """

        def before(module: nn.Module, args: Any) -> Any:
            self._states = shorten(args[0], self.arguments)
            self.arguments = {}
            return None if self._states is None else (self._states, *args[1:])

        def behind(module: nn.Module, args: Any, output: Any) -> Any:
            if self._states is None:
                return None
            self._update = output[0] if isinstance(output, tuple) else output
            # The layer adds this to states that are about to be replaced; one zero fits any length.
            nothing = self._update.new_zeros(1, 1, 1)
            return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            if self._states is None or self._update is None:
                return None
            states, self._states, self._update = self._states + self._update, None, None
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return [
            self.norm.register_forward_pre_hook(before),
            self.mlp.register_forward_hook(behind),
            # In front of the hooks by which transformers records hidden states.
            self.layer.register_forward_hook(replace, prepend=True),
        ]
