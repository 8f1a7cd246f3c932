"""HiPrune against masks and indices of the reference implementation."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.methods import hiprune

SYSTEM = "hiprune"


def _received(attention: np.ndarray) -> torch.Tensor:
    """Mean over heads and query rows, class token column removed."""
    return torch.from_numpy(attention).mean(dim=(1, 2))[:, 1:]


def _check_crops(golden: dict[str, np.ndarray]) -> None:
    object_score, deep_score = _received(golden["object_attn"]), _received(golden["deep_attn"])
    crops = object_score.shape[0]
    budget = hiprune.frame_share(int(golden["retention"]), crops)
    alpha = round(float(golden["alpha"]), 6)
    width = int(golden["grid_side"])
    for official in (True, False):
        mask = hiprune.select_hierarchical(
            object_score, deep_score, budget, grid_width=width, alpha=alpha, official=official
        )
        np.testing.assert_array_equal(mask.numpy(), golden["mask"], err_msg=f"official={official}")
    np.testing.assert_array_equal(mask.nonzero().numpy(), golden["kept_index_flat"])


def _check_merged_tokens(golden: dict[str, np.ndarray]) -> None:
    scores = [torch.from_numpy(golden[name]).unsqueeze(0) for name in ("object_score", "deep_score")]
    budget, alpha, width = int(golden["budget"]), round(float(golden["alpha"]), 6), int(golden["width"])
    assert budget == round(scores[0].numel() * round(float(golden["retain"]), 6))
    official = hiprune.select_hierarchical(*scores, budget, grid_width=width, alpha=alpha, official=True)
    np.testing.assert_array_equal(official[0].nonzero()[:, 0].numpy(), golden["kept"])
    corrected = hiprune.select_hierarchical(*scores, budget, grid_width=width, alpha=alpha)
    assert int(corrected.sum()) == budget


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "object_attn" in golden:
        _check_crops(golden)
    else:
        _check_merged_tokens(golden)
