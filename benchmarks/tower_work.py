"""What a method inside the vision tower does by itself, on random queries, keys, values and states.

Timed is what the runtime adds to a block because of the method: its decision on the queries, keys and values, and
averaging or gathering the states of the tokens by that decision. The block itself is not run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.geometry import SIGLIP
from benchmarks.stopwatch import timed
from tokensieve.core.method import Method
from tokensieve.core.sample import HostFacts
from tokensieve.core.tower import Block, TowerProgram, TowerSample
from tokensieve.ops.bipartite import TokenGroups, chain_groups, identity_groups, merge_weighted

__all__ = ["TowerWork", "run_tower"]

HEADS, HEAD_WIDTH, WIDTH = SIGLIP["num_attention_heads"], 72, SIGLIP["hidden_size"]


@dataclass(frozen=True)
class TowerWork:
    """Result of `run_tower`.

    Attributes
    ----------
    seconds
        Processor time of the method.
    groups : Tensor [F * N]
        Token that every patch became part of, counted over all pictures; -1 for dropped patches.
    """

    seconds: float
    groups: Tensor


def run_tower(method: Method, facts: HostFacts, pictures: int, patches: int) -> TowerWork:
    """Let a method act in every block of a tower up to the projected one.

    Parameters
    ----------
    method
        One with the stage ``encoder``.
    facts
        Of a host whose patches become tokens without pooling; with a class token where the method needs one.
    pictures, patches : int
        F and N.

    Returns
    -------
    TowerWork
        Its own time, and what became of the patches.
    """
    generator = torch.Generator().manual_seed(2)
    front = int(facts.has_class_token)
    sample = TowerSample(
        pictures, patches, pictures * patches, True, facts.feature_layer + 1, facts.has_class_token, facts
    )
    program = method.tower_program(sample)
    states = torch.randn(pictures, front + patches, WIDTH, generator=generator)
    size = torch.ones(pictures, front + patches)
    parts = identity_groups(pictures, front + patches)
    left = torch.arange(patches).expand(pictures, -1)
    seconds = 0.0
    for layer in range(sample.layers):
        q, k, v = (torch.randn(pictures, HEADS, states.shape[1], HEAD_WIDTH, generator=generator) for _ in range(3))
        state = _State(program, Block(layer, q, k, v, facts.has_class_token), states, size)
        seconds += timed(state.step, torch.device("cpu"), time.process_time)
        states, size = state.states, state.size
        if state.groups is not None:
            parts = chain_groups(parts, state.groups)
        if state.kept is not None:
            left = left.gather(1, state.kept)
    start = torch.arange(pictures).unsqueeze(1)
    if left.shape[1] < patches:
        groups = torch.full((pictures, patches), -1)
        groups.scatter_(1, left, torch.arange(left.shape[1]).expand_as(left) + start * left.shape[1])
    else:
        groups = parts.group[:, front:] - front + start * (parts.source.shape[1] - front)
    return TowerWork(seconds, groups.flatten())


class _State:
    """One block: what the method is shown, and what it makes of the states."""

    def __init__(self, program: TowerProgram, block: Block, states: Tensor, size: Tensor) -> None:
        self.program, self.block, self.states, self.size = program, block, states, size
        self.groups: TokenGroups | None = None
        self.kept: Tensor | None = None

    def step(self) -> None:
        """Both questions that the runtime asks, carried out."""
        self.groups = self.program.merge(self.block)
        if self.groups is not None:
            self.states, self.size = merge_weighted(self.states, self.size, self.groups)
        self.kept = self.program.drop(self.block)
        if self.kept is not None:
            front = int(self.block.class_token)
            index = torch.cat((torch.zeros(len(self.kept), front, dtype=torch.long), self.kept + front), 1)
            self.states = self.states.gather(1, index.unsqueeze(2).expand(-1, -1, WIDTH))
