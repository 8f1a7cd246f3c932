"""Prompts that were prepared one by one as one padded batch, as the processor itself would have made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokensieve.errors import HostError
from tokensieve.prompt import Prompt

__all__ = ["can_join", "join_prompts"]

# What runs alongside the tokens; everything else belongs to visuals and is put end to end.
_ALONGSIDE = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def can_join(one: Prompt, other: Prompt) -> bool:
    """Whether two prompts hold the same kinds of inputs, of shapes that fit together.

    Pictures that a family cuts into tiles may differ in the number of tiles; such prompts cannot share a batch.
    """
    return one.inputs.keys() == other.inputs.keys() and all(
        _fit(name, value, other.inputs[name], one.tokens) for name, value in one.inputs.items()
    )


def join_prompts(prompts: Sequence[Prompt], pad_id: int) -> Prompt:
    """Put prompts of one row each into one batch, padded on the left.

    Parameters
    ----------
    prompts : sequence of Prompt
        Each with ``input_ids [1, L]``; every pair must pass `can_join`.
    pad_id : int
        Token to pad with.

    Returns
    -------
    Prompt
        With ``input_ids [B, L]`` of the longest; ``attention_mask`` tells padding from tokens.

    Raises
    ------
    HostError
        If the prompts do not fit together.
    """
    first, *others = prompts
    if not all(can_join(first, other) for other in others):
        raise HostError("Prompts whose inputs have other shapes cannot share a batch; answer them one by one.")
    if not others:
        return first
    longest = max(prompt.tokens for prompt in prompts)
    joined = {}
    for name in first.inputs:
        values: list[Tensor] = [prompt.inputs[name] for prompt in prompts]
        if name in _ALONGSIDE:
            filler = pad_id if name == "input_ids" else 0
            values = [pad(value, (longest - value.shape[1], 0), value=filler) for value in values]
        joined[name] = torch.cat(values)
    notes = list(dict.fromkeys(note for prompt in prompts for note in prompt.notes))
    return Prompt(joined, first.as_video, notes)


def _fit(name: str, one: Any, other: Any, tokens: int) -> bool:
    """Whether two inputs of one name can be put together."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.ndim != other.ndim or not one.ndim:
        return False
    if name in _ALONGSIDE:
        return one.ndim == 2 and one.shape[0] == other.shape[0] == 1
    # An input that we do not know and that is as long as the tokens may need padding of its own.
    alongside = one.ndim > 1 and tokens in one.shape[1:]
    return one.dtype == other.dtype and one.shape[1:] == other.shape[1:] and not alongside
