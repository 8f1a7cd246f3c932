"""HoliTom against values of the reference implementation: segments, outer merge, inner merge."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.ops import temporal_merge
from tokensieve.ops.grid import insert_after, row_ends
from tokensieve.ops.merge import apply_merge
from tokensieve.ops.segment import segment_static
from tokensieve.ops.similarity import neighbour_cosine

SYSTEM = "holitom"


def _check_segments(golden: dict[str, np.ndarray]) -> None:
    similarity = torch.from_numpy(golden["feature_sim"])
    segments, reduced = segment_static(similarity, float(golden["tau"]), int(golden["max_window"]))
    assert segments == [tuple(pair) for pair in golden["segments"].tolist()]
    assert reduced == float(golden["total_reduced"])


def _check_outer(golden: dict[str, np.ndarray]) -> None:
    # Files of the grid layout hold a newline per occupied row on top of the emitted tokens.
    is_grid = golden["output"].shape[0] != int(golden["n_static"].sum() + golden["n_dynamic"].sum())
    features, attention = torch.from_numpy(golden["feat"]), torch.from_numpy(golden["attn"])
    frames, tokens, _ = features.shape
    threshold, window = float(golden["tau"]), int(golden["max_window"])
    retention = float(golden["retain_ratio"])

    similarity = neighbour_cosine(features)
    segments, reduced = segment_static(similarity, threshold, window)
    assert segments == [tuple(pair) for pair in golden["segments"].tolist()]
    assert reduced == float(golden["total_reduced"])
    ratio = temporal_merge.adjusted_retention(retention, frames, tokens, reduced)
    np.testing.assert_allclose(ratio, float(golden["adjusted_ratio"]), rtol=0, atol=1e-12)
    static = temporal_merge.static_patches(similarity, segments, threshold)
    np.testing.assert_array_equal(static.numpy(), golden["static_mask"])

    merged = temporal_merge.outer_merge(
        features,
        attention,
        retention,
        threshold=threshold,
        beta=float(golden["beta"]),
        plain_mean=bool(golden["plain_mean"]),
        neighbours=int(golden["k_neighbors"]),
        max_window=window,
        context_ratio=float(golden["d_ratio"]),
        layout="grid" if is_grid else "flat",
    )
    is_static = static.flatten()[merged.source]
    frame = merged.source // tokens
    for number, (first, last) in enumerate(segments):
        inside = (frame >= first) & (frame <= last)
        assert int((inside & is_static).sum()) == int(golden["n_static"][number])
        assert int((inside & ~is_static).sum()) == int(golden["n_dynamic"][number])

    remade = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    np.testing.assert_allclose(remade.numpy(), merged.features.numpy(), rtol=0, atol=1e-5)
    output = merged.features
    if is_grid:
        width = round(tokens**0.5)
        ends = row_ends(merged.source, tokens, width)
        output = insert_after(output, ends, torch.from_numpy(golden["newline"]))
    np.testing.assert_allclose(output.numpy(), golden["output"], rtol=0, atol=1e-5)


def _check_inner(golden: dict[str, np.ndarray]) -> None:
    kept, hidden = temporal_merge.inner_merge(
        torch.from_numpy(golden["hidden_before"]),
        torch.from_numpy(golden["attention_last_token"]),
        int(golden["image_start"]),
        int(golden["image_length"]),
        float(golden["drop_ratio"]),
    )
    np.testing.assert_array_equal(kept.numpy(), golden["kept_positions"])
    np.testing.assert_allclose(hidden.numpy(), golden["hidden_after"], rtol=0, atol=1e-5)


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "feature_sim" in golden:
        _check_segments(golden)
    elif "hidden_before" in golden:
        _check_inner(golden)
    else:
        _check_outer(golden)
