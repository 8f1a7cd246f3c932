"""VisionZip's functions against a plain loop and the properties its specification lists."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.methods import visionzip
from tokensieve.ops.merge import apply_merge


def _frames(frames: int = 4, patches: int = 36, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, patches, 10, generator=generator)
    return (
        features,
        torch.rand(frames, patches, generator=generator),
        torch.randn(frames, patches, 6, generator=generator),
    )


def _plain(
    features: list[list[float]],
    attention: list[float],
    keys: list[list[float]],
    dominant: int,
    contextual: int,
    merge: str,
) -> tuple[list[int], list[list[float]]]:
    """One frame, token by token."""
    order = sorted(range(len(attention)), key=lambda n: (-attention[n], n))
    kept, rest = sorted(order[:dominant]), sorted(order[dominant:])
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.hypot(*a) / math.hypot(*b)

    groups: dict[int, list[int]] = {target: [] for target in targets}
    for n in rest:
        if n not in groups:
            groups[max(targets, key=lambda t: cosine(keys[n], keys[t]))].append(n)
    rows = [features[n] for n in kept]
    for target, members in groups.items():
        total = [sum(features[n][d] for n in members) for d in range(len(features[0]))]
        if merge == "mean":
            rows.append([(x + y) / (1 + len(members)) for x, y in zip(features[target], total, strict=True)])
        else:
            rows.append([x + y / max(1, len(members)) for x, y in zip(features[target], total, strict=True)])
    return kept + targets, rows


@pytest.mark.parametrize("merge", ["added", "mean"])
@pytest.mark.parametrize(("dominant", "contextual"), [(10, 4), (1, 1), (0, 3), (20, 16), (30, 5)])
def test_equals_a_plain_loop(merge: visionzip.ContextMerge, dominant: int, contextual: int) -> None:
    features, attention, keys = _frames()
    merged = visionzip.compress_frames(features, attention, keys, dominant, contextual, context_merge=merge)
    for f in range(4):
        places, rows = _plain(
            features[f].tolist(), attention[f].tolist(), keys[f].tolist(), dominant, contextual, merge
        )
        span = slice(f * len(places), (f + 1) * len(places))
        assert (merged.source[span] - f * 36).tolist() == places
        torch.testing.assert_close(merged.features[span], torch.tensor(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["flat", "grid"])
def test_the_merge_map_explains_the_features(layout: str) -> None:
    features, attention, keys = _frames()
    merged = visionzip.compress_frames(features, attention, keys, 9, 4, layout=layout)  # type: ignore[arg-type]
    again = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    torch.testing.assert_close(again, merged.features, rtol=1e-5, atol=1e-5)
    assert sorted(merged.merge_map.source.tolist()) == list(range(4 * 36))
    weights = torch.zeros(merged.source.numel()).index_add(0, merged.merge_map.target, merged.merge_map.weight)
    # A dominant token weighs 1; a contextual one 2 (or 1 where nothing was assigned).
    assert set(weights.round(decimals=4).tolist()) <= {1.0, 2.0}
    assert int((weights > 1.5).sum()) <= 4 * 4
    if layout == "grid":
        assert bool((merged.source.diff() > 0).all())
        flat = visionzip.compress_frames(features, attention, keys, 9, 4)
        assert torch.equal(flat.features[flat.source.argsort()], merged.features)


def test_dominant_rows_are_untouched_and_frames_independent() -> None:
    features, attention, keys = (x[:1].expand(3, *x.shape[1:]).contiguous() for x in _frames())
    merged = visionzip.compress_frames(features, attention, keys, 12, 5)
    rows = merged.features.view(3, 17, -1)
    for other in (1, 2):
        assert torch.equal(merged.source[:17] + other * 36, merged.source[other * 17 : (other + 1) * 17])
        torch.testing.assert_close(rows[0], rows[other], rtol=1e-6, atol=1e-6)
    assert torch.equal(rows[0, :12], features[0, merged.source[:12]])


def test_equal_features_double_in_context() -> None:
    _, attention, keys = _frames()
    value = torch.linspace(-1, 1, 10)
    features = value.expand(4, 36, 10).contiguous()
    merged = visionzip.compress_frames(features, attention, keys, 12, 5)
    members = torch.bincount(merged.merge_map.target, minlength=merged.source.numel()) - 1
    expected = value * (1 + (members > 0).float())[:, None]
    torch.testing.assert_close(merged.features, expected, rtol=1e-5, atol=1e-6)
    contextual = (torch.arange(merged.source.numel()) % 17) >= 12
    assert int(members[contextual].sum()) == 4 * (36 - 12 - 5)
    assert int(members[~contextual].sum()) == 0


def test_budgets() -> None:
    assert [visionzip.split_budget(s) for s in (64, 50, 40, 49, 1)] == [(54, 10), (42, 8), (33, 7), (41, 8), (0, 1)]
    assert visionzip.split_budget(49, 6 / 7) == (42, 7)
    with pytest.raises(MethodError, match="cannot split 0 tokens"):
        visionzip.split_budget(0)


def test_no_context_only_prunes() -> None:
    features, attention, keys = _frames()
    merged = visionzip.compress_frames(features, attention, keys, 7, 0)
    assert torch.equal(merged.features, features.flatten(0, 1)[merged.source])
    assert merged.source.numel() == 28


def test_half_precision_keeps_its_dtype() -> None:
    features, attention, keys = _frames()
    merged = visionzip.compress_frames(features.bfloat16(), attention, keys, 7, 3)
    exact = visionzip.compress_frames(features.bfloat16().float(), attention, keys, 7, 3)
    assert merged.features.dtype == torch.bfloat16
    assert torch.equal(merged.features, exact.features.bfloat16())


def test_official_grid_misplaces_tokens() -> None:
    features, attention, keys = _frames()
    merged = visionzip.compress_frames(features, attention, keys, 9, 4)
    newline = torch.full((10,), 9.0)
    correct, official = (visionzip.grid_tokens(merged, attention, 9, newline, 6, official=o) for o in (False, True))
    assert correct.shape == official.shape == (4 * (13 + 6), 10)
    ends = (correct == newline).all(dim=1)
    row_of = torch.cat((torch.zeros(1, dtype=torch.long), ends.long().cumsum(0)[:-1]))[~ends]
    assert torch.equal(row_of, merged.source.sort().values // 6)
    assert not torch.equal(correct, official)


def test_bad_arguments() -> None:
    features, attention, keys = _frames()
    with pytest.raises(MethodError, match="cannot form 7 contextual tokens out of the 6"):
        visionzip.assign_context(keys, torch.arange(6).expand(4, -1), 7)
    for dominant, contextual in ((36, 1), (0, 0), (-1, 4)):
        with pytest.raises(MethodError, match=f"{dominant} dominant and {contextual} contextual"):
            visionzip.compress_frames(features, attention, keys, dominant, contextual)
    with pytest.raises(MethodError, match=r"\(3, 36\)"):
        visionzip.compress_frames(features, attention[:3], keys, 4, 2)
    with pytest.raises(MethodError, match="'sum' is unknown"):
        visionzip.compress_frames(features, attention, keys, 4, 2, context_merge="sum")  # type: ignore[arg-type]
