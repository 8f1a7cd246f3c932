"""VidCom2 against values of the reference implementation: scores, budgets, kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.plan import Plan, reading_order
from tokensieve.core.sample import TokenSample
from tokensieve.methods.vidcom2 import VidCom2
from tokensieve.ops import uniqueness

SYSTEM = "vidcom2"


def _close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    tokens = int(golden["tokens_per_frame"])
    retention = float(golden["retention"])
    flat = torch.from_numpy(golden["feat"])
    features = flat.unflatten(0, (-1, tokens))
    frames = features.shape[0]

    channels = uniqueness.low_variance_channels(features)
    np.testing.assert_array_equal(channels.numpy(), golden["sel_channels"])
    video_score, frame_score = uniqueness.gaussian_scores(features, channels)
    _close(video_score, golden["video_score"])
    _close(frame_score, golden["frame_score"])
    _close(uniqueness.frame_uniqueness(video_score), golden["frame_uniqueness"])

    ratios, counts = uniqueness.frame_budget(features, retention)
    _close(ratios, golden["scales"])
    np.testing.assert_array_equal(counts.numpy(), golden["k_per_frame"])

    keep, ratios, counts = uniqueness.select_tokens(features, retention)
    _close(ratios, golden["scales"])
    np.testing.assert_array_equal(counts.numpy(), golden["k_per_frame"])
    np.testing.assert_array_equal((keep % tokens).numpy(), golden["kept_local"])

    out_sum = flat[keep].double().sum(0)
    if "newline" in golden:
        side = round(tokens**0.5)
        layout = Layout.regular("video", frames, side, side, "row")
        sequence, slots = reading_order(layout, Plan(keep, separators="after-frame"))
        np.testing.assert_array_equal(sequence.numpy(), golden["kept_global"])
        newlines = int((slots < 0).sum())
        assert newlines == side * frames
        out_sum += torch.from_numpy(golden["newline"]).double() * newlines
    else:
        np.testing.assert_array_equal(keep.numpy(), golden["kept_global"])
    np.testing.assert_allclose(out_sum.numpy(), golden["out_sum"], rtol=1e-5, atol=1e-3)


def test_method_gives_the_reference_plan(golden: dict[str, np.ndarray]) -> None:
    """The registered method on a sample, as the runtime calls it."""
    tokens = int(golden["tokens_per_frame"])
    features = torch.from_numpy(golden["feat"])
    frames = features.shape[0] // tokens
    sample = TokenSample(features, Layout.regular("video", frames, 1, tokens))
    plan = VidCom2(retention=float(golden["retention"])).run_tokens(sample)
    np.testing.assert_array_equal((plan.keep % tokens).numpy(), golden["kept_local"])
    np.testing.assert_array_equal(plan.info["frame_count"].numpy(), golden["k_per_frame"])
