"""LLaVA-Scissor against values of the reference implementation: regions, assignment, merged features."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.sample import TokenSample
from tokensieve.methods import llava_scissor
from tokensieve.ops.merge import apply_merge

SYSTEM = "llava-scissor"


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    features, tau = torch.from_numpy(golden["feat"]), float(golden["tau"])
    frames, tokens, _ = features.shape
    for approximate in (False, True):
        # Below the sampling limit the sample holds every node.
        regions = llava_scissor.find_regions(features, tau, approximate=approximate, epsilon=float(golden["epsilon"]))
        assert regions.joined.numel() == int(golden["stage1_count"])
        assert regions.source.numel() == int(golden["stage2_count"])
        np.testing.assert_array_equal(regions.label.numpy(), golden["stage1_label"])
        np.testing.assert_array_equal(regions.joined.numpy(), golden["stage2_label"])
    merged, assigned = llava_scissor.merge_regions(features, regions)
    np.testing.assert_array_equal(assigned.numpy(), golden["assign"])
    np.testing.assert_allclose(merged.features.numpy(), golden["out"], rtol=0, atol=1e-5)
    remade = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    np.testing.assert_allclose(remade.numpy(), merged.features.numpy(), rtol=0, atol=1e-5)
    assert bool((merged.source.diff() > 0).all())

    sample = TokenSample(features.flatten(0, 1), Layout.regular("video", frames, 1, tokens))
    plan = llava_scissor.LLaVAScissor(tau=tau).run_tokens(sample)
    np.testing.assert_array_equal(plan.keep.numpy(), merged.source.numpy())
    np.testing.assert_allclose(plan.features.numpy(), golden["out"], rtol=0, atol=1e-5)
