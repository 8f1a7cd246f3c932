"""The engine's own EVS and VidCom2 beside ours on the same embeddings: equal, or different for a stated reason."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tokensieve.bridges.vllm.choice import PREFIX, read_choice
from tokensieve.bridges.vllm.families import FAMILIES
from tokensieve.bridges.vllm.pruning import grid_layout, kept_count, kept_tokens
from tokensieve.core.registry import build
from tokensieve.core.sample import TokenSample

FAMILY = FAMILIES["Qwen3VLForConditionalGeneration"]
GRIDS = ((6, 8, 12), (9, 6, 6), (16, 4, 10))
RATES = (0.5, 0.7, 0.75, 0.9)
MERGE = 2


def embeddings(grid: tuple[int, int, int], seed: int) -> Tensor:
    """A slowly changing video [n, 32] in which a few cells change at every step."""
    generator = torch.Generator().manual_seed(seed)
    steps, cells = grid[0], grid[1] * grid[2] // MERGE**2
    video = torch.randn(cells, 32, generator=generator).repeat(steps, 1, 1)
    noise = torch.randn(steps, cells, 32, generator=generator)
    amount = torch.rand(steps, cells, 1, generator=generator) ** 4
    return (video + amount * noise).flatten(0, 1)


def engine_mask(name: str, features: Tensor, grid: tuple[int, int, int], rate: float) -> Tensor:
    """What the engine's own function keeps."""
    module: Any = importlib.import_module(f"vllm.multimodal.video_prune.{name}")
    mask: Tensor = module.compute_retention_mask(features, grid, MERGE, rate)
    return mask


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rate", RATES)
def test_evs_keeps_the_same_tokens(grid: tuple[int, int, int], rate: float) -> None:
    features, layout = embeddings(grid, 1), grid_layout(grid, MERGE)
    ours = kept_tokens(read_choice(PREFIX + "evs", rate), FAMILY, features, layout)
    assert ours.tolist() == engine_mask("evs", features, grid, rate).nonzero().flatten().tolist()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rate", RATES)
def test_vidcom2_differs_by_the_correction_of_its_total_only(grid: tuple[int, int, int], rate: float) -> None:
    """The published method keeps about R*F*N tokens, but an engine must know the number before it sees the video.

    vLLM keeps floor(R*F*N) and adds or drops the difference by score over the whole video. We keep round(R*F*N)
    and correct the budgets of frames by their largest remainders. Before any correction the tokens are the same.
    """
    features, layout = embeddings(grid, 2), grid_layout(grid, MERGE)
    theirs = engine_mask("vidcom2", features, grid, rate)
    published = torch.zeros(layout.patches, dtype=torch.bool)
    method = build("vidcom2", {"retention": round(1 - rate, 12)})
    plan = method.run_tokens(TokenSample(features, layout, {}, FAMILY.facts()))
    published[plan.keep] = True
    corrected = abs(int(published.sum()) - int(theirs.sum()))
    assert int((published ^ theirs).sum()) == corrected

    choice = read_choice(PREFIX + "vidcom2", rate)
    ours = kept_tokens(choice, FAMILY, features, layout)
    assert ours.numel() == kept_count(choice, layout)
    assert 0 <= ours.numel() - int(theirs.sum()) <= 1
    mine = torch.zeros(layout.patches, dtype=torch.bool)
    mine[ours] = True
    assert int((published ^ mine).sum()) <= corrected + 1
