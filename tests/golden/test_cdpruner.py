"""CDPruner against relevance and choices of the reference implementation."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.methods import cdpruner
from tokensieve.ops import determinant

SYSTEM = "cdpruner"


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    features, image, text = (torch.from_numpy(golden[name]) for name in ("feat", "image_embeds", "text_embeds"))
    relevance = cdpruner.relevance_to_question(image, text)
    np.testing.assert_allclose(relevance.numpy(), golden["relevance"], rtol=0, atol=1e-5)
    count = int(golden["num_keep"])
    keep, order = cdpruner.select_conditional(features, count, relevance)
    np.testing.assert_array_equal(order.numpy(), golden["select_order"])
    np.testing.assert_array_equal(keep.numpy(), golden["kept"])
    mask = torch.zeros(features.shape[:2], dtype=torch.int64).scatter_(1, keep, 1)
    np.testing.assert_array_equal(mask.numpy(), golden["mask"])
    for strategy in get_args(determinant.Strategy):
        order, gains = determinant.greedy_determinant(features, count, relevance, strategy=strategy)
        np.testing.assert_array_equal(order.numpy(), golden["select_order"], err_msg=strategy)
        assert bool((gains > 0).all())


def test_registered_method_matches_reference(golden: dict[str, np.ndarray]) -> None:
    """Frames of one video, with the signals that a host with a CLIP tower gives."""
    features, image, text = (torch.from_numpy(golden[name]) for name in ("feat", "image_embeds", "text_embeds"))
    frames, patches, count = *features.shape[:2], int(golden["num_keep"])
    facts = HostFacts("llava", 32, 24, 22, True, tower_pair="clip", text_tower="the pair")
    method = cdpruner.CDPruner(retention=count / patches)
    assert method.signals(facts) == (cdpruner.ALIGNED, cdpruner.SEGMENTS)
    signals = {cdpruner.ALIGNED: image.flatten(0, 1), cdpruner.SEGMENTS: text}
    layout = Layout.regular("video", frames, 1, patches)
    plan = method.plan_tokens(TokenSample(features.flatten(0, 1), layout, signals, facts))
    expected = golden["kept"] + np.arange(frames)[:, None] * patches
    np.testing.assert_array_equal(plan.keep.numpy(), expected.flatten())
    assert method.token_count(layout) == expected.size
    assert plan.info["relevance"] == "pair"
    np.testing.assert_allclose(plan.info["question_relevance"], golden["relevance"].flatten(), rtol=0, atol=1e-5)
