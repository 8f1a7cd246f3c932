"""PruneVid against values of the released code: scenes, merged tokens, selection for a question."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from tokensieve.methods import prunevid, prunevid_merge
from tokensieve.ops.merge import apply_merge

SYSTEM = "prunevid"


def _check_merging(golden: dict[str, np.ndarray]) -> None:
    features = torch.from_numpy(golden["feat"])
    share, temporal = float(golden["temporal_segment_ratio"]), int(golden["k_temporal"])
    labels = prunevid_merge.frame_labels(features, share, temporal)
    np.testing.assert_array_equal(labels.numpy(), golden["frame_labels"])
    assert prunevid_merge.refine_labels(labels.tolist()) == golden["refined_labels"].tolist()
    scenes = prunevid_merge.find_scenes(features, share, float(golden["tau"]), temporal)
    assert [last - first + 1 for first, last in scenes.segments] == golden["window_sizes"].tolist()
    np.testing.assert_array_equal(scenes.static.numpy(), golden["static_mask"])
    merged, static, dynamic = prunevid_merge.merge_scenes(
        features, scenes, float(golden["cluster_ratio"]), neighbours=int(golden["k_spatial"])
    )
    assert static == golden["static_sizes"].tolist()
    assert dynamic == golden["dynamic_sizes"].tolist()
    np.testing.assert_allclose(merged.features.numpy(), golden["output"], rtol=0, atol=1e-5)
    remade = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    np.testing.assert_allclose(remade.numpy(), golden["output"], rtol=0, atol=1e-5)
    assert merged.source.unique().numel() == merged.source.numel()


def _check_refinement(golden: dict[str, np.ndarray]) -> None:
    for labels, refined, segments in zip(golden["labels"], golden["refined"], golden["segments"], strict=True):
        ours = prunevid_merge.refine_labels(labels.tolist())
        assert ours == refined.tolist()
        assert [len(list(run)) for _, run in itertools.groupby(ours)] == segments[segments > 0].tolist()


def _check_selection(golden: dict[str, np.ndarray]) -> None:
    scores = prunevid.question_scores(torch.from_numpy(golden["text_to_visual"]))
    np.testing.assert_array_equal(scores.numpy(), golden["score"])
    kept = prunevid.select_for_question(
        scores,
        golden["static_sizes"].tolist(),
        golden["dynamic_sizes"].tolist(),
        golden["window_sizes"].tolist(),
        float(golden["alpha"]),
    )
    np.testing.assert_array_equal(kept.numpy(), golden["kept"])
    prefix, visual, suffix = int(golden["prefix"]), scores.numel(), int(golden["suffix"])
    behind = torch.arange(prefix + visual, prefix + visual + suffix)
    positions = torch.cat((torch.arange(prefix), prefix + kept, behind))
    np.testing.assert_array_equal(positions.numpy(), golden["position_ids"])


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "text_to_visual" in golden:
        _check_selection(golden)
    elif "refined" in golden:
        _check_refinement(golden)
    else:
        _check_merging(golden)
