"""Recoverable Compression: fall back, order, and what the corrected form promises beyond the released one."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.methods import recoverable_compression as rc


def _picture(patches: int = 144, width: int = 48, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Patches, keys, attention and similarity with some that stand out."""
    generator = torch.Generator().manual_seed(seed)
    features, keys = (torch.randn(patches, width, generator=generator) for _ in range(2))
    attention, similarity = (torch.rand(patches, generator=generator) * 0.01 for _ in range(2))
    attention[torch.randperm(patches, generator=generator)[:20]] += 1 + torch.rand(20, generator=generator)
    similarity[torch.randperm(patches, generator=generator)[:9]] += 2 + torch.rand(9, generator=generator)
    return features, keys, attention, similarity


def _with_centres() -> tuple[torch.Tensor, ...]:
    for seed in range(50):
        picture = _picture(seed=seed)
        selection = rc.select_outliers(*picture[2:])
        if rc.merge_rest(*picture[:3], selection).centres.numel() >= 2:
            return picture
    raise AssertionError("no picture with two centres")


def test_kept_tokens_in_raster_order_then_centres() -> None:
    features, keys, attention, similarity = _with_centres()
    selection = rc.select_outliers(attention, similarity)
    found = rc.merge_rest(features, keys, attention, selection)
    kept, centres = found.kept, found.centres
    assert bool((kept.diff() > 0).all())
    assert bool((attention[centres].diff() <= 0).all())
    assert found.has_extra and found.features.shape[0] == kept.numel() + centres.numel() + 1
    assert torch.equal(found.features[: kept.numel()], features[kept])
    assert sorted((*kept.tolist(), *selection.rest.tolist())) == list(range(144))
    assert attention[selection.visual].min() >= attention[selection.text].max()


def test_centres_by_hand() -> None:
    features, keys, attention, similarity = _with_centres()
    selection = rc.select_outliers(attention, similarity)
    found = rc.merge_rest(features, keys, attention, selection)
    centre = int(found.centres[1])
    others = [j for j in selection.rest.tolist() if j != centre]
    cosine = torch.nn.functional.cosine_similarity(keys[centre][None], keys[others])
    affinity = (cosine + 50 * selection.similarity[others]).tolist()
    best = sorted(range(len(others)), key=lambda j: -affinity[j])[:32]
    expected = features[centre] + sum(attention[others[j]] * features[others[j]] for j in best)
    torch.testing.assert_close(found.features[found.kept.numel() + 1], expected)
    loose = [j for j in selection.rest.tolist() if j not in found.centres.tolist()]
    torch.testing.assert_close(found.features[-1], attention[loose] @ features[loose])


def test_the_order_of_patches_does_not_matter() -> None:
    features, keys, attention, similarity = _with_centres()
    order = torch.randperm(144, generator=torch.Generator().manual_seed(3))

    def run(idx: torch.Tensor, official: bool) -> torch.Tensor:
        selection = rc.select_outliers(attention[idx], similarity[idx])
        found = rc.merge_rest(features[idx], keys[idx], attention[idx], selection, official=official)
        return found.features[found.kept.numel() :]

    torch.testing.assert_close(run(order, False), run(torch.arange(144), False), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(order, True), run(torch.arange(144), True), rtol=1e-4, atol=1e-4)


def test_nothing_stands_out() -> None:
    features, keys = _picture()[:2]
    same = torch.full((144,), 0.01)
    selection = rc.select_outliers(same, same)
    assert selection.kept.numel() == 0
    found = rc.merge_rest(features, keys, same, selection)
    torch.testing.assert_close(found.features, features.sum(dim=0, keepdim=True) * 0.01)
    assert found.has_extra
    assert rc.merge_rest(features, keys, same, selection, official=True).features.shape == (0, 48)


@pytest.mark.parametrize("patches", [1, 2, 5, 25])
def test_small_pictures(patches: int) -> None:
    generator = torch.Generator().manual_seed(patches)
    states = [torch.randn(patches + 1, 8, generator=generator) for _ in range(3)]
    found = rc.compress(*states, torch.rand(patches, generator=generator))
    assert found.features.shape[0] >= 1
    assert bool(torch.isfinite(found.features).all())


def test_inputs_stay_as_they_were() -> None:
    features, keys, attention, similarity = _picture()
    before = similarity.clone()
    rc.merge_rest(features, keys, attention, rc.select_outliers(attention, similarity))
    assert torch.equal(before, similarity)


def test_bad_shapes() -> None:
    features, keys, attention, similarity = _picture()
    with pytest.raises(MethodError, match="one length"):
        rc.select_outliers(attention, similarity[1:])
    with pytest.raises(MethodError, match="one row per patch"):
        rc.merge_rest(features[1:], keys, attention, rc.select_outliers(attention, similarity))
    with pytest.raises(MethodError, match="do not fit together"):
        rc.text_similarity(torch.rand(1, 5, 4), torch.rand(6, 4), torch.rand(1, 5))
