"""What the second stage trains on, step by step: phases of clips that grow, in blocks that are encoded ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tokensieve.world.training.clips import Blocks


@dataclass(frozen=True)
class Phase:
    """Part of the curriculum: ``steps`` of batches of ``clips`` clips with ``frames`` frames and ``turns`` turns."""

    steps: int
    frames: int
    clips: int
    turns: int
    missing: float
    """Share of the steps in which visual tokens are missing."""
    focus: bool = False
    """Whether the families that lag behind are exercised."""


BLOCK_STEPS = 24
"""Steps that share a block of clips."""

VISITS = 2
"""How often a clip of a block is used."""

SEED_STRIDE = 1_000_000
"""Clips between the first ones of two seeds: a training that goes on with another seed sees new clips."""


def curriculum(scale: float = 1.0) -> tuple[Phase, ...]:
    """The phases of the whole training; ``scale`` shortens all of them for a trial."""
    plan = (
        Phase(480, 4, 24, 16, 0.1),
        Phase(240, 8, 16, 20, 0.3),
        Phase(1008, 16, 10, 20, 0.35),
        Phase(48, 32, 5, 20, 0.5),
        Phase(96, 16, 12, 20, 0.4),
    )
    return tuple(replace(phase, steps=_whole_blocks(phase.steps * scale)) for phase in plan)


def refinement(scale: float = 1.0) -> tuple[Phase, ...]:
    """The phases that follow on saved models."""
    plan = (
        Phase(216, 8, 20, 14, 0.2, focus=True),
        Phase(528, 16, 12, 14, 0.3, focus=True),
        Phase(24, 32, 6, 14, 0.4, focus=True),
        Phase(72, 16, 12, 16, 0.35),
    )
    return tuple(replace(phase, steps=_whole_blocks(phase.steps * scale)) for phase in plan)


def _whole_blocks(steps: float) -> int:
    return max(1, round(steps / BLOCK_STEPS)) * BLOCK_STEPS


def batches(
    blocks: Blocks, phases: tuple[Phase, ...], done: int, seed: int = 0
) -> Iterator[tuple[int, Phase, dict[str, torch.Tensor], int]]:
    """Steps from ``done`` on, each with its phase, its encoded clips and the index of the first."""
    plan = _plan(phases, seed * SEED_STRIDE)
    for i, (begin, phase, first) in enumerate(plan):
        if begin + BLOCK_STEPS <= done:
            continue
        number = phase.clips * BLOCK_STEPS // VISITS
        block = blocks.take(first, number, phase.frames, phase.focus)
        if i + 1 < len(plan):
            _, after, start = plan[i + 1]
            blocks.request(start, after.clips * BLOCK_STEPS // VISITS, after.frames, after.focus)
        for j in range(BLOCK_STEPS):
            if begin + j < done:
                continue
            at = j * phase.clips % number
            yield begin + j, phase, {name: part[at : at + phase.clips] for name, part in block.items()}, first + at


def _plan(phases: tuple[Phase, ...], clip: int) -> list[tuple[int, Phase, int]]:
    """First step, phase and first clip of every block, the clips counted from ``clip``."""
    found, step = [], 0
    for phase in phases:
        for _ in range(phase.steps // BLOCK_STEPS):
            found.append((step, phase, clip))
            step += BLOCK_STEPS
            clip += phase.clips * BLOCK_STEPS // VISITS
    return found
