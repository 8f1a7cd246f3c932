"""Recoverable Compression against outputs of the reference implementation, its two slips included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokensieve.methods import recoverable_compression as rc
from tokensieve.ops.outliers import outlier_ratio

SYSTEM = "recoverable-compression"


def _check_full(golden: dict[str, np.ndarray]) -> None:
    q, k, hidden = (torch.from_numpy(golden[name])[0] for name in ("q", "k", "hidden"))
    similarity = torch.from_numpy(golden["similarity"])[0, 0]
    found = rc.compress(hidden, q, k, similarity, official=True)
    assert found.features.shape == golden["out"].shape[1:]
    np.testing.assert_allclose(found.features.numpy(), golden["out"][0], rtol=0, atol=1e-4)
    attention = rc.undivided_class_attention(q[None], k[None])[0]
    selection = rc.select_outliers(attention, similarity)
    values = (attention, selection.similarity, attention[selection.rest])
    for row, scores in zip(golden["lof"], values, strict=True):
        assert scores.numel() == int(row[0])
        assert outlier_ratio(scores, int(row[1])) == row[2]
    correct = rc.compress(hidden, q, k, similarity)
    assert torch.equal(correct.kept, found.kept)
    assert correct.centres.numel() == int(selection.rest.numel() * golden["lof"][2, 2])


def _check_ratios(golden: dict[str, np.ndarray]) -> None:
    for values, k, ratio in zip(golden["values"], golden["k"], golden["ratio"], strict=True):
        assert outlier_ratio(torch.from_numpy(values), int(k)) == ratio


def _check_text(golden: dict[str, np.ndarray]) -> None:
    names = ("last_hidden", "visual_projection", "text")
    similarity = rc.text_similarity(*(torch.from_numpy(golden[name]) for name in names))
    np.testing.assert_allclose(similarity.numpy(), golden["similarity"], rtol=0, atol=1e-6)


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "out" in golden:
        _check_full(golden)
    elif "ratio" in golden:
        _check_ratios(golden)
    elif "visual_projection" in golden:
        _check_text(golden)
    else:
        pytest.fail(f"a file with the arrays {sorted(golden)} is of no known kind")
