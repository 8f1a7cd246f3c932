"""VidCom2's functions against a plain loop, and the behaviour that its budget promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokensieve.errors import MethodError, RetentionError
from tokensieve.ops import uniqueness


def _clip(frames: int = 8, tokens: int = 36, dim: int = 24, noise: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(tokens, dim, generator=generator)
    return scene + noise * torch.randn(frames, tokens, dim, generator=generator)


def _plain(features: np.ndarray, retention: float, similarity: str = "gaussian") -> dict[str, np.ndarray]:
    """The published steps written out in float64, one token at a time."""
    frames, tokens, dim = features.shape
    flat = features.reshape(-1, dim).astype(np.float64)
    channels = np.sort(np.argsort(flat.var(axis=0), kind="stable")[: dim // 2])
    units = [row / max(np.linalg.norm(row), 1e-12) for row in flat[:, channels]]
    video_centre = np.mean(units, axis=0)
    video, frame = np.zeros((frames, tokens)), np.zeros((frames, tokens))
    for t in range(frames):
        frame_centre = np.mean(units[t * tokens : (t + 1) * tokens], axis=0)
        for n in range(tokens):
            y = units[t * tokens + n]
            for out, g in ((video, video_centre), (frame, frame_centre)):
                if similarity == "cosine":
                    out[t, n] = y @ g / (np.linalg.norm(y) * np.linalg.norm(g))
                else:
                    squared = ((y - g) ** 2).sum()
                    out[t, n] = sum(math.exp(-squared / (2 * 2.0**e)) for e in range(-3, 2))
    uniqueness = -video.mean(axis=1)
    p = np.exp((uniqueness - uniqueness.max()) / 0.01)
    p /= p.sum()
    ratios = np.minimum(1.0, retention * (1 + p - p.mean()))
    counts = [max(1, round(ratio * tokens)) for ratio in ratios]
    keep = []
    for t in range(frames):
        score = video[t] + frame[t]
        best = sorted(range(tokens), key=lambda n: (score[n], n))[: counts[t]]
        keep += [t * tokens + n for n in sorted(best)]
    names = ("channels", "video", "frame", "uniqueness", "ratios", "counts", "keep")
    return dict(zip(names, (channels, video, frame, uniqueness, ratios, counts, keep), strict=True))


@pytest.mark.parametrize("similarity", ["gaussian", "cosine"])
@pytest.mark.parametrize(("dim", "retention"), [(24, 0.25), (17, 0.15), (40, 0.6)])
def test_equals_the_plain_steps(similarity: uniqueness.Similarity, dim: int, retention: float) -> None:
    features = _clip(dim=dim, seed=dim)
    expected = _plain(features.numpy(), retention, similarity)
    channels = uniqueness.low_variance_channels(features)
    assert channels.tolist() == expected["channels"].tolist()
    video, frame = uniqueness.gaussian_scores(features, channels, similarity)
    np.testing.assert_allclose(video.numpy(), expected["video"], rtol=0, atol=3e-6)
    np.testing.assert_allclose(frame.numpy(), expected["frame"], rtol=0, atol=3e-6)
    keep, ratios, counts = uniqueness.select_tokens(features, retention, similarity=similarity)
    np.testing.assert_allclose(ratios.numpy(), expected["ratios"], rtol=0, atol=1e-5)
    assert counts.tolist() == expected["counts"]
    assert keep.tolist() == expected["keep"]


def test_near_duplicate_tokens_keep_their_precision() -> None:
    # |y - g|^2 is about 1e-6 here, where a careless expansion of the square would be pure noise.
    features = 5 + _clip(noise=1e-4) * 1e-3
    expected = _plain(features.numpy(), 0.25)
    video, _ = uniqueness.gaussian_scores(features, torch.from_numpy(expected["channels"]))
    np.testing.assert_allclose(video.numpy(), expected["video"], rtol=0, atol=1e-5)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    features = _clip(frames=7)
    keep = uniqueness.select_tokens(features, 0.25)[0]
    monkeypatch.setattr("tokensieve.ops.centre._CPU_BLOCK_BYTES", 3 * 4 * features[0].numel())
    assert uniqueness.select_tokens(features, 0.25)[0].tolist() == keep.tolist()


@pytest.mark.parametrize(("retention", "tokens"), [(0.25, 14), (0.35, 10), (0.25, 196), (0.15, 30)])
def test_identical_frames_share_equally(retention: float, tokens: int) -> None:
    features = _clip(frames=1, tokens=tokens).repeat(6, 1, 1)
    _, ratios, counts = uniqueness.select_tokens(features, retention)
    assert counts.tolist() == [round(retention * tokens)] * 6
    np.testing.assert_allclose(ratios.numpy(), retention, rtol=1e-4)


def test_an_unrelated_frame_gets_most() -> None:
    features = _clip(frames=8, tokens=49, noise=0.02)
    features[5] = _clip(frames=1, tokens=49, seed=99)[0]
    counts = uniqueness.select_tokens(features, 0.25)[2]
    others = torch.cat((counts[:5], counts[6:]))
    assert int(counts[5]) >= 1.5 * int(others.max())
    assert abs(int(counts.sum()) - 0.25 * 8 * 49) <= 8 / 2 + 1


def test_full_retention_keeps_everything() -> None:
    keep, ratios, counts = uniqueness.select_tokens(_clip(), 1.0)
    assert keep.tolist() == list(range(8 * 36))
    assert ratios.tolist() == [1.0] * 8
    assert counts.tolist() == [36] * 8


@pytest.mark.parametrize("retention", [0.004, 0.1, 0.25, 0.77])
def test_exact_total(retention: float) -> None:
    features = _clip(frames=9, tokens=50)
    keep, _, counts = uniqueness.select_tokens(features, retention, exact_total=True)
    assert keep.numel() == int(counts.sum()) == max(9, round(retention * 9 * 50))
    loose = uniqueness.select_tokens(features, retention)[2]
    assert int((counts - loose).abs().max()) <= 1


def test_one_frame_and_clipped_ratios() -> None:
    assert uniqueness.frame_ratios(torch.tensor([3.0]), 0.25).tolist() == [0.25]
    ratios = uniqueness.frame_ratios(torch.tensor([0.0, 0.0, 5.0]), 0.9)
    torch.testing.assert_close(ratios, torch.tensor([0.6, 0.6, 1.0]))


def test_frame_budget_is_the_budget_of_the_whole_method() -> None:
    features = _clip()
    _, ratios, counts = uniqueness.select_tokens(features, 0.3, temperature=0.1)
    budget = uniqueness.frame_budget(features, 0.3, temperature=0.1)
    assert torch.equal(budget[0], ratios)
    assert torch.equal(budget[1], counts)


def test_frame_variants() -> None:
    score = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    expected = {
        "equal": torch.zeros(4),
        "negative_mean": -score.mean(1),
        "positive_mean": score.mean(1),
        "positive_max": score.amax(1),
        "negative_max": -score.amax(1),
        "positive_min": score.amin(1),
        "negative_min": -score.amin(1),
    }
    for variant, value in expected.items():
        torch.testing.assert_close(uniqueness.frame_uniqueness(score, variant), value)
    with pytest.raises(MethodError, match="'mean' is unknown"):
        uniqueness.frame_uniqueness(score, "mean")


def test_equal_frames_variant_ignores_content() -> None:
    counts = uniqueness.select_tokens(_clip(), 0.25, frame_variant="equal")[2]
    assert counts.tolist() == [9] * 8


def test_token_variants() -> None:
    video, frame, attention = torch.rand(3, 2, 5).unbind()
    expected = {
        "video_and_frame": video + frame,
        "video": video,
        "negative_video": -video,
        "frame": frame,
        "negative_frame": -frame,
        "attention": attention,
        "negative_attention": -attention,
    }
    for variant, value in expected.items():
        assert torch.equal(uniqueness.token_scores(video, frame, variant, attention), value)
    with pytest.raises(MethodError, match="needs attention"):
        uniqueness.token_scores(video, frame, "attention")
    with pytest.raises(MethodError, match="'both' is unknown"):
        uniqueness.token_scores(video, frame, "both")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_scored_in_float32(dtype: torch.dtype) -> None:
    features = _clip().to(dtype)
    assert torch.equal(uniqueness.select_tokens(features, 0.25)[0], uniqueness.select_tokens(features.float(), 0.25)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["gaussian", "cosine"])
def test_literal_scores_in_another_precision(dtype: torch.dtype, similarity: uniqueness.Similarity) -> None:
    features = _clip()
    channels = uniqueness.low_variance_channels(features, dtype)
    literal = uniqueness.gaussian_scores(features, channels, similarity, dtype)
    fast = uniqueness.gaussian_scores(features, channels, similarity)
    tolerance = {torch.float64: 3e-6, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    for score, reference in zip(literal, fast, strict=True):
        assert score.dtype == dtype
        torch.testing.assert_close(score.float(), reference, rtol=0, atol=tolerance)


def test_half_precision_scoring_reproduces_the_larger_budget() -> None:
    features = _clip(frames=32, tokens=196, dim=16, noise=0.01)
    features[7] = _clip(frames=1, tokens=196, dim=16, seed=5)[0]
    # A low temperature gives all of the surplus to frame 7 in every precision.
    totals = {
        dtype: int(uniqueness.frame_budget(features, 0.25, temperature=1e-4, score_dtype=dtype)[1].sum())
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert totals == {torch.float32: 1553, torch.float16: 1553, torch.bfloat16: 1584}


def test_zero_tokens_and_bad_options() -> None:
    features = _clip()
    features[2, :5] = 0
    assert torch.isfinite(uniqueness.gaussian_scores(features)[0]).all()
    with pytest.raises(MethodError, match=r"\(8, 36\)"):
        uniqueness.select_tokens(features[..., 0], 0.25)
    with pytest.raises(MethodError, match="'dot' is unknown"):
        uniqueness.select_tokens(features, 0.25, similarity="dot")
    with pytest.raises(MethodError, match="temperature is 0"):
        uniqueness.frame_ratios(torch.zeros(3), 0.25, 0.0)
    with pytest.raises(RetentionError):
        uniqueness.select_tokens(features, 1.5)
