"""FlashVID against values of the released code: segments, selection, merged tokens, cut inside the LLM."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.methods import flashvid
from tokensieve.ops.merge import apply_merge
from tokensieve.ops.transitions import segment_transitions, transition_similarity

SYSTEM = "flashvid"
SELECTIONS: tuple[flashvid.Selection, ...] = ("attention", "diversity", "attended", "attended_event")


def _sorted_rows(index: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows by index; two rows of one index by their values, as the reference leaves their order open."""
    return rows[np.lexsort((*rows.T[::-1], index))]


def _check_merging(golden: dict[str, np.ndarray]) -> None:
    features = torch.from_numpy(golden["feat"])
    frames, tokens, _ = features.shape
    segments = [(0, frames - 1)]
    if int(golden["do_segment"]):
        similarity = transition_similarity(features.mean(dim=1))
        segments = segment_transitions(similarity, float(golden["segment_threshold"]), int(golden["min_segment_num"]))
    assert [last - first + 1 for first, last in segments] == golden["segment_lengths"].tolist()
    budget = flashvid.frame_budget(
        tokens, float(golden["retention"]), float(golden["expansion"]), float(golden["alpha"])
    )
    assert budget == (int(golden["num_adts"]), int(golden["num_tstm"]))
    merged, selected = flashvid.flash_merge(
        features,
        torch.from_numpy(golden["attention"]),
        budget,
        segments,
        selection=SELECTIONS[int(golden["method"])],
        threshold=float(golden["temporal_threshold"]),
        official=True,
    )
    np.testing.assert_array_equal(selected.numpy(), golden["adts_index"])
    np.testing.assert_array_equal(merged.source.numpy(), golden["out_index"])
    ours = _sorted_rows(golden["out_index"], merged.features.numpy())
    np.testing.assert_allclose(ours, _sorted_rows(golden["out_index"], golden["out"]), rtol=0, atol=1e-5)
    remade = apply_merge(features.flatten(0, 1).double(), merged.merge_map, merged.source.numel())
    np.testing.assert_allclose(remade.numpy(), merged.features.numpy(), rtol=0, atol=1e-5)


def _check_cut(golden: dict[str, np.ndarray]) -> None:
    start, length = int(golden["visual_start"]), int(golden["visual_length"])
    row = torch.from_numpy(golden["attention_last_query"]).mean(dim=0)
    kept = flashvid.prune_visual(row[start : start + length], float(golden["llm_retention"]))
    positions = torch.cat((torch.arange(start), start + kept, torch.arange(start + length, row.numel())))
    np.testing.assert_array_equal(positions.numpy(), golden["keep_index"])
    np.testing.assert_array_equal(golden["hidden"][positions.numpy()], golden["out"])


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "attention_last_query" in golden:
        _check_cut(golden)
    else:
        _check_merging(golden)
