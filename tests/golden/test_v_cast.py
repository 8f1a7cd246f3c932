"""V-CAST against values of the reference implementation: curvature, budgets, scores, kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.sample import TokenSample
from tokensieve.methods import v_cast

SYSTEM = "v-cast"


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    features = torch.from_numpy(golden["feat"])
    frames, tokens, _ = features.shape
    retention, budget = float(golden["retention"]), int(golden["budget"])
    vectors = v_cast.frame_vectors(features)
    bend = v_cast.curvature(vectors)
    np.testing.assert_allclose(bend.numpy(), golden["curvature"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(v_cast.frame_weights(bend).numpy(), golden["weights"], rtol=0, atol=1e-5)
    assert v_cast.total_budget(frames, tokens, retention) == budget
    _, counts = v_cast.frame_budget(features, retention, remainder="official")
    np.testing.assert_array_equal(counts.numpy(), golden["k_per_frame"])
    scores = v_cast.token_scores(features, vectors)
    np.testing.assert_allclose(scores.numpy(), golden["score"], rtol=0, atol=1e-5)

    # Pictures, unlike videos of one step, are always pruned.
    layout = Layout.regular("video" if frames > 1 else "image", frames, 1, tokens)
    method = v_cast.VCast(retention=retention, remainder="official")
    assert method.token_count(layout) == budget
    plan = method.run_tokens(TokenSample(features.flatten(0, 1), layout))
    np.testing.assert_array_equal(plan.keep.numpy(), golden["keep_index"])
    np.testing.assert_array_equal(features.flatten(0, 1)[plan.keep].numpy(), golden["out"])
    deepstack = torch.from_numpy(golden["deepstack"]).flatten(0, 1)
    np.testing.assert_array_equal(deepstack[plan.keep].numpy(), golden["deepstack_out"])

    fair = v_cast.frame_budget(features, retention)[1]
    assert int(fair.sum()) == budget
