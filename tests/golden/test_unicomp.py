"""UniComp against values of the reference implementation: groups, budgets, kept tokens, merged features."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.methods import unicomp
from tokensieve.ops.frame_groups import fuse_frames
from tokensieve.ops.merge import apply_merge

SYSTEM = "unicomp"


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    features = torch.from_numpy(golden["feat"])
    retention, automatic = float(golden["retention"]), bool(golden["auto"])
    starts = unicomp.group_frames(features, retention, float(golden["Uf"]), automatic=automatic)
    np.testing.assert_array_equal(starts.numpy(), golden["group_start"])
    fused = fuse_frames(features, starts)
    np.testing.assert_allclose(fused.numpy(), golden["fused"], rtol=0, atol=1e-5)

    vectors = golden.get("frame_global")
    result = unicomp.compress(
        features,
        retention,
        keys=torch.from_numpy(golden["key"]),
        frame_vectors=None if vectors is None else torch.from_numpy(vectors),
        frame_radius=float(golden["Uf"]),
        token_radius=float(golden["Uc"]),
        automatic=automatic,
        official=True,
    )
    np.testing.assert_array_equal(result.starts.numpy(), golden["group_start"])
    merged, compressed = result.merged, bool(golden["compressed"])
    assert result.early != compressed
    if compressed:
        np.testing.assert_array_equal(result.budgets.numpy(), golden["tokens_per_frame"])
        np.testing.assert_array_equal(result.kept.numpy(), golden["kept_per_frame"].reshape(-1))
        assert int(result.kept.sum()) <= int(golden["max_tokens"])
        ends = torch.from_numpy(golden["kept_per_frame"].reshape(-1)).cumsum(0)
        output = torch.from_numpy(golden["newline"]).repeat(ends[-1] + ends.numel(), 1)
        output[torch.arange(int(ends[-1])) + torch.bucketize(torch.arange(int(ends[-1])), ends, right=True)] = (
            merged.features
        )
    else:
        assert int(result.kept.sum()) == int(golden["kept_per_frame"].sum())
        output = merged.features
    np.testing.assert_allclose(output.numpy(), golden["out"], rtol=0, atol=1e-4)
    remade = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    np.testing.assert_allclose(remade.numpy(), merged.features.numpy(), rtol=0, atol=1e-5)
    assert bool((merged.source.diff() > 0).all())
