"""EVS against a plain loop and the properties its specification lists."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.methods import evs

RATES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97]


def _clip(steps: int = 6, cells: int = 20, dim: int = 8, noise: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(cells, dim, generator=generator)
    return scene + noise * torch.randn(steps, cells, dim, generator=generator)


def _plain(features: torch.Tensor, rate: float) -> list[int]:
    """Cell by cell in float64."""
    steps, cells, _ = features.shape
    scored = []
    for t in range(steps):
        for c in range(cells):
            if t == 0:
                change = 255.0
            else:
                a, b = features[t, c].double(), features[t - 1, c].double()
                change = 1 - float(a @ b) / (max(float(a.norm()), 1e-8) * max(float(b.norm()), 1e-8))
            scored.append((-change, t * cells + c))
    count = max(cells, int(steps * cells * (1 - rate)))
    return sorted(index for _, index in sorted(scored)[:count])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75, 0.95])
def test_equals_the_plain_steps(rate: float) -> None:
    features = _clip(seed=3)
    features[2, 5] = 0
    mask = evs.retention_mask(features, rate)
    assert mask.flatten().nonzero().flatten().tolist() == _plain(features, rate)


def test_count_follows_floating_point() -> None:
    assert evs.retained_count(8, 112, 0.75) == 224
    assert evs.retained_count(10, 100, 0.9) == 100
    assert evs.retained_count(20, 50, 0.9) == 99
    assert evs.EVS(retention=0.1).token_count(Layout.regular("video", 20, 5, 10)) == 99


@pytest.mark.parametrize("rate", RATES)
def test_count_is_known_without_features(rate: float) -> None:
    for steps in range(1, 65):
        features = _clip(steps, 6, 3, seed=steps)
        assert int(evs.retention_mask(features, rate).sum()) == evs.retained_count(steps, 6, rate)
        if steps == 1 or rate == 0:
            assert bool(evs.retention_mask(features, rate).all())


@pytest.mark.parametrize("dim", [7, 64, 333])
@pytest.mark.parametrize("reference", ["previous", "last_kept"])
def test_identical_steps_keep_the_first_tokens_in_order(dim: int, reference: evs.Reference) -> None:
    features = _clip(1, 30, dim).repeat(5, 1, 1)
    mask = evs.retention_mask(features, 0.5, reference=reference)
    assert mask.flatten().nonzero().flatten().tolist() == list(range(75))


def test_replaced_cells_come_first() -> None:
    steps, cells = 6, 25
    features = _clip(1, cells, 16).repeat(steps, 1, 1) + 1e-3 * _clip(steps, cells, 16, noise=1.0, seed=9)
    changed = set()
    for t in range(1, steps - 1):
        features[t, 3 * t] = torch.randn(16, generator=torch.Generator().manual_seed(t))
        changed |= {t * cells + 3 * t, (t + 1) * cells + 3 * t}
    count = cells + len(changed)
    mask = evs.retention_mask(features, 1 - (count + 0.5) / (steps * cells))
    assert set(mask.flatten().nonzero().flatten().tolist()) == changed | set(range(cells))


def test_no_matrix_over_all_tokens() -> None:
    # All pairs of these tokens would take 17 GB.
    assert int(evs.retention_mask(_clip(64, 1024, 2), 0.9).sum()) == evs.retained_count(64, 1024, 0.9)


def test_slow_drift_shows_against_the_last_kept_token() -> None:
    angle = torch.arange(12) * 0.1
    drifting = torch.stack((angle.cos(), angle.sin()), dim=1)[:, None]
    jumping = drifting[:1].repeat(12, 1, 1)
    jumping[6:] = torch.tensor([math.cos(0.15), math.sin(0.15)])
    features = torch.cat((drifting, jumping), dim=1)
    threshold = 1 - math.cos(0.25)
    assert evs.changed_mask(features, threshold).sum(0).tolist() == [1, 1]
    against = evs.changed_mask(features, threshold, "last_kept")
    assert against[:, 0].nonzero().flatten().tolist() == [0, 3, 6, 9]
    assert against[:, 1].nonzero().flatten().tolist() == [0]
    # Six tokens: the published ranking takes the jump and then early steps of the drift.
    ranked = evs.retention_mask(features, 1 - 6.5 / 24, reference="last_kept")
    assert int(ranked.sum()) == 6
    assert ranked[:, 0].nonzero().flatten().diff().min() >= 2
    published = evs.retention_mask(features, 1 - 6.5 / 24)
    assert bool(published[6, 1])


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_last_kept_reaches_the_count(rate: float) -> None:
    features = _clip(9, 40, noise=0.2)
    mask = evs.retention_mask(features, rate, reference="last_kept")
    assert int(mask.sum()) == evs.retained_count(9, 40, rate)
    assert bool(mask[0].all())


def test_half_precision_scores() -> None:
    features = _clip(4, 20, 64)
    literal = evs.dissimilarity(features, torch.bfloat16)
    assert literal.dtype == torch.bfloat16
    torch.testing.assert_close(literal.float(), evs.dissimilarity(features), rtol=0, atol=0.02)
    assert torch.equal(evs.dissimilarity(features.bfloat16()), evs.dissimilarity(features.bfloat16().float()))


def test_method_on_videos_pictures_and_thresholds() -> None:
    features = _clip(4, 16)
    sample = TokenSample(features.flatten(0, 1), Layout.regular("video", 4, 4, 4, "row"))
    method = evs.EVS(retention=0.4)
    plan = method.run_tokens(sample)
    assert plan.keep.numel() == method.token_count(sample.layout) == 25
    assert plan.separators == "in-place"
    assert plan.info["frame_count"].tolist()[0] == 16
    picture = TokenSample(features[0], Layout.regular("image", 1, 4, 4))
    assert method.run_tokens(picture).keep.tolist() == list(range(16))
    streaming = evs.EVS(threshold=0.1)
    assert streaming.token_count(sample.layout) is None
    kept = streaming.run_tokens(sample).keep
    assert kept.tolist() == evs.changed_mask(features, 0.1).flatten().nonzero().flatten().tolist()


def test_bad_options() -> None:
    with pytest.raises(MethodError, match=r"pruning rate of EVS is 1\.0"):
        evs.retained_count(4, 4, 1.0)
    with pytest.raises(MethodError, match="'first' is unknown"):
        evs.EVS(reference="first")
    with pytest.raises(MethodError, match="'first' is unknown"):
        evs.retention_mask(_clip(), 0.5, reference="first")
    with pytest.raises(MethodError, match="not 'int8'"):
        evs.EVS(score_dtype="int8")
    with pytest.raises(MethodError, match=r"\[T, N, D\]"):
        evs.retention_mask(torch.zeros(4, 4), 0.5)
