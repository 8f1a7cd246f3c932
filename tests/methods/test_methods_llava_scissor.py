"""LLaVA-Scissor against a plain loop and the properties its specification lists."""

from __future__ import annotations

import pytest
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.plan import reading_order
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.methods import llava_scissor
from tokensieve.ops.merge import apply_merge


def _clip(frames: int = 5, tokens: int = 24, dim: int = 12, noise: float = 0.25, seed: int = 0) -> torch.Tensor:
    """A scene made of a few materials, with noise of different strength."""
    generator = torch.Generator().manual_seed(seed)
    material = torch.randn(7, dim, generator=generator)
    scene = material[torch.randint(0, 7, (tokens,), generator=generator)]
    strength = noise * 2 * torch.rand(frames, tokens, 1, generator=generator)
    return scene + strength * torch.randn(frames, tokens, dim, generator=generator)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b) / (float(a.norm()) * float(b.norm()))


def _plain_components(rows: list[torch.Tensor], tau: float) -> list[list[int]]:
    links = [[j for j in range(len(rows)) if _cosine(rows[i], rows[j]) > tau] for i in range(len(rows))]
    left, found = set(range(len(rows))), []
    while left:
        stack, component = [left.pop()], set()
        while stack:
            component.add(i := stack.pop())
            stack += [j for j in links[i] if j in left]
            left -= set(links[i])
        found.append((min(component, key=lambda i: (-len(links[i]), i)), sorted(component)))
    return [component for _, component in sorted(found)]


def _plain(features: torch.Tensor, tau: float) -> tuple[list[torch.Tensor], list[int]]:
    """The published steps in float64, one token at a time: outputs, and output of every token."""
    features = features.double()
    middle = [
        torch.stack([frame[i] for i in part]).mean(0)
        for frame in features
        for part in _plain_components(list(frame), tau)
    ]
    outputs = [torch.stack([middle[i] for i in part]).mean(0) for part in _plain_components(middle, tau)]
    assigned = []
    for token in features.flatten(0, 1):
        similarity = [_cosine(token, output) for output in outputs]
        assigned.append(similarity.index(max(similarity)))
    for j, output in enumerate(outputs):
        mine = [token for token, k in zip(features.flatten(0, 1), assigned, strict=True) if k == j]
        outputs[j] = (output + sum(mine)) / (len(mine) + 1)
    return outputs, assigned


@pytest.mark.parametrize("tau", [0.3, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("seed", range(2))
def test_equals_the_plain_steps(tau: float, seed: int) -> None:
    features = _clip(seed=seed)
    expected, expected_assigned = _plain(features, tau)
    regions = llava_scissor.find_regions(features, tau)
    merged, assigned = llava_scissor.merge_regions(features, regions)
    assert assigned.tolist() == expected_assigned
    torch.testing.assert_close(merged.features, torch.stack(expected).float(), rtol=0, atol=1e-5)
    remade = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    torch.testing.assert_close(remade, merged.features, rtol=0, atol=1e-5)


def test_copies_of_a_frame_change_nothing_but_the_weights() -> None:
    frame = _clip(1, noise=0.3)
    counts, outputs = set(), []
    for copies in (1, 2, 5):
        features = frame.repeat(copies, 1, 1)
        regions = llava_scissor.find_regions(features, 0.9)
        merged, assigned = llava_scissor.merge_regions(features, regions)
        counts.add(merged.source.numel())
        alone = llava_scissor.nearest(frame[0], merged.features)
        size = torch.bincount(assigned, minlength=merged.source.numel())[:, None]
        outputs.append((merged.features * (size + 1), size // copies))
        assert assigned.view(copies, -1).unique(dim=0).shape[0] == 1
        assert alone.shape == (24,)
    assert len(counts) == 1
    # output * (size + 1) is the region's mean plus copies times the sum of the tokens assigned to it
    (one, size), (two, _), (five, _) = outputs
    torch.testing.assert_close(five - two, 3 * (two - one), rtol=0, atol=1e-4)
    assert int(size.sum()) == 24


@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_without_links_nothing_changes(tau: float) -> None:
    features = _clip(dim=40)
    plan = llava_scissor.LLaVAScissor(tau=tau).run_tokens(
        TokenSample(features.flatten(0, 1), Layout.regular("video", 5, 4, 6))
    )
    assert plan.keep.tolist() == list(range(120))
    torch.testing.assert_close(plan.features, features.flatten(0, 1))


def test_everything_linked_is_one_token() -> None:
    features = _clip()
    merged, _ = llava_scissor.merge_regions(features, llava_scissor.find_regions(features, -1.01))
    flat = features.flatten(0, 1)
    torch.testing.assert_close(merged.features, (flat.view(5, 24, -1).mean(1).mean(0) + flat.sum(0))[None] / 121)


def test_chains_are_one_region() -> None:
    angle = torch.tensor([0.0, 0.3, 0.6, 2.0])
    features = torch.stack((angle.cos(), angle.sin()), dim=1)[None]
    assert llava_scissor.find_regions(features, 0.9).label.tolist() == [[0, 0, 0, 1]]


def test_permuting_a_frame_permutes_the_outputs() -> None:
    features = _clip()
    moved = features.clone()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved[2] = moved[2, order]
    outputs = [
        llava_scissor.merge_regions(x, llava_scissor.find_regions(x, 0.9))[0].features for x in (features, moved)
    ]
    assert outputs[0].shape == outputs[1].shape
    distance = torch.cdist(outputs[0], outputs[1]).amin(dim=1)
    assert float(distance.max()) < 1e-4


def test_large_regions_weigh_no_more_than_small_ones() -> None:
    direction = torch.eye(4)
    features = torch.stack((direction[[0, 0, 0]], (direction[0] + 0.1 * direction[1]).repeat(3, 1)))
    features[1, 1:] = direction[[2, 3]]
    regions = llava_scissor.find_regions(features, 0.9)
    merged, assigned = llava_scissor.merge_regions(features, regions)
    assert assigned.tolist() == [0, 0, 0, 0, 1, 2]
    torch.testing.assert_close(merged.features[0], (direction[0] * 5 + direction[1] * 0.15) / 5)


@pytest.mark.parametrize("retention", [0.1, 0.25, 0.5, 0.8])
def test_search_meets_the_retention(retention: float) -> None:
    features = _clip(8, 50, 32, noise=0.3)
    tau, merged = llava_scissor.search_regions(features, retention)
    assert abs(merged.source.numel() - 400 * retention) <= 0.02 * 400 * retention
    direct = llava_scissor.merge_regions(features, llava_scissor.find_regions(features, tau))[0]
    assert direct.source.tolist() == merged.source.tolist()
    torch.testing.assert_close(direct.features, merged.features)


def test_search_without_the_matrix_of_all_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    features = _clip(6, 30, 32, noise=0.3)
    with_matrix = llava_scissor.search_regions(features, 0.3)
    monkeypatch.setattr(llava_scissor, "stores_pairs", lambda tokens, width: False)
    without = llava_scissor.search_regions(features, 0.3)
    assert with_matrix[0] == without[0]
    assert with_matrix[1].source.tolist() == without[1].source.tolist()
    torch.testing.assert_close(with_matrix[1].features, without[1].features)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3, 3.0])
def test_a_cap_is_never_exceeded(noise: float) -> None:
    features = _clip(6, 30, noise=noise)
    for retention in (0.01, 0.1, 0.3):
        merged = llava_scissor.search_regions(features, retention, cap=True)[1]
        assert 1 <= merged.source.numel() <= max(1, round(180 * retention))


def test_sampled_components_lack_edges() -> None:
    features = _clip(2, 60, noise=0.6)
    exact = llava_scissor.find_regions(features, 0.8)
    few = llava_scissor.find_regions(
        features, 0.8, approximate=True, epsilon=1.2, generator=torch.Generator().manual_seed(0)
    )
    again = llava_scissor.find_regions(
        features, 0.8, approximate=True, epsilon=1.2, generator=torch.Generator().manual_seed(0)
    )
    assert few.source.tolist() == again.source.tolist()
    assert few.joined.numel() > exact.joined.numel()
    # Every sampled region lies inside one exact region.
    pairs = torch.stack((few.label.flatten(), exact.label.flatten())).unique(dim=1)
    assert pairs.shape[1] == few.joined.numel()


def test_no_newline_of_a_video_remains() -> None:
    layout = Layout.regular("video", 5, 4, 6, "row")
    plan = llava_scissor.LLaVAScissor(retention=0.3).run_tokens(TokenSample(_clip().flatten(0, 1), layout))
    tokens, slots = reading_order(layout, plan.checked(120, "llava-scissor"))
    assert slots.tolist() == list(range(plan.keep.numel()))
    assert bool(layout.is_patch[tokens].all())


def test_zero_tokens_pictures_and_half_precision() -> None:
    features = _clip()
    features[0, :4] = 0
    merged = llava_scissor.search_regions(features.bfloat16(), 0.3)[1]
    assert merged.features.dtype == torch.bfloat16
    assert bool(torch.isfinite(merged.features).all())
    for side in (1, 2, 4):
        picture = TokenSample(_clip(1, side * side)[0], Layout.regular("image", 1, side, side))
        plan = llava_scissor.LLaVAScissor(retention=0.25).run_tokens(picture)
        assert 1 <= plan.keep.numel() <= side * side


def test_bad_options() -> None:
    with pytest.raises(MethodError, match="epsilon is 0"):
        llava_scissor.LLaVAScissor(epsilon=0)
    with pytest.raises(MethodError, match="give tau as well"):
        llava_scissor.LLaVAScissor(approximate=True)
    with pytest.raises(MethodError, match=r"\[F, N, D\]"):
        llava_scissor.find_regions(torch.zeros(3, 4))
