"""Tower signals that are made of the output of a tower layer instead of its attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.errors import SignalError
from tokensieve.hosts.towers import PictureTower
from tokensieve.pairing.heads import Summary
from tokensieve.pairing.pair import TextPair

__all__ = ["STATE_SIGNALS", "listen_states"]

STATE_SIGNALS = (
    "encoder.states",
    "encoder.aligned",
    "encoder.projected",
    "encoder.head_attention",
    "encoder.head_vector",
)
"""Names of the signals that `listen_states` gives."""


def listen_states(
    module: nn.Module,
    tower: PictureTower,
    layer: int,
    wanted: Sequence[tuple[str, str]],
    pair: TextPair | None,
    sink: Callable[[str, Tensor], None],
) -> Any:
    """A hook that hands signals of one tower layer to ``sink`` on every call of the tower.

    Parameters
    ----------
    module
        The vision tower, of pictures in a batch.
    tower
        How it is read.
    layer
        Index from zero.
    wanted
        Signal name and key of every request at this layer.
    pair
        For signals in the space shared with texts.
    sink
        Takes key and value: ``[B, N]`` or ``[B, N, C]`` without class token, ``[B, C]`` for signals of pictures.

    Returns
    -------
    Handle of the hook.
    """

    def hook(block: nn.Module, args: Any, output: Any) -> None:
        states = (output[0] if isinstance(output, tuple) else output).detach()
        states = states[:, 1:] if tower.class_token else states
        with torch.no_grad():
            summary: Summary | None = None
            for name, key in wanted:
                if name == "encoder.states":
                    sink(key, states)
                    continue
                if pair is None:
                    raise SignalError(f"{name} needs the text tower of the vision tower; none was loaded.")
                if name == "encoder.aligned":
                    sink(key, pair.align(states))
                elif name == "encoder.projected":
                    sink(key, pair.project(states))
                else:
                    summary = summary or pair.summarise(states)
                    sink(key, summary.vector if name == "encoder.head_vector" else summary.attention)

    layers = module.get_submodule(tower.layers_path)
    assert isinstance(layers, nn.ModuleList)
    return layers[layer].register_forward_hook(hook)
