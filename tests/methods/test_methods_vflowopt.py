"""VFlowOpt's functions: entropy, recycling against a plain loop, cuts and the constraint on their ratios."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError, RetentionError, TokensieveError
from tokensieve.hosts import host_for, tiny
from tokensieve.methods import vflowopt
from tokensieve.methods.vflowopt import StoredStrategy, VFlowOpt, search
from tokensieve.ops.merge import apply_merge


@pytest.fixture(scope="module")
def models() -> Any:
    """Model, processor and a batch of two prompts of a family, loaded once."""
    logging.disable_progress_bar()
    cache: dict[str, tuple[Any, Any, dict[str, torch.Tensor]]] = {}

    def get(family: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
        if family not in cache:
            model, processor = tiny.load(family)
            cache[family] = (model.eval(), processor, dict(tiny.example_inputs(family, processor, batch=2)))
        return cache[family]

    return get


def _picture(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, importance, view, row and column of a 9 x 9 base picture and an 8 x 14 mosaic."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.cartesian_prod(torch.tensor([v]), torch.arange(r), torch.arange(c)) for v, r, c in _GRIDS]
    view, row, column = torch.cat(places).unbind(1)
    features = torch.randn(view.numel(), 5, generator=generator)
    return features, torch.rand(view.numel(), generator=generator), view, row, column


_GRIDS = [(0, 9, 9), (1, 8, 14)]


def test_entropy_equals_counting() -> None:
    pixels = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).mul(6).floor() / 6
    entropy = vflowopt.pixel_entropy(pixels, patch=4)
    assert entropy.shape == (2, 1, 2, 3)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                block = (pixels[b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] * 255).int()
                greys = Counter(round(0.3333 * int(value)) for value in block.sum(dim=0).flatten())
                expected = -sum(n / 16 * math.log2(n / 16 + 1e-10) for n in greys.values())
                assert float(entropy[b, 0, i, j]) == pytest.approx(expected, abs=1e-5)


def test_entropy_refuses_normalised_pixels() -> None:
    with pytest.raises(MethodError, match="from 0 to 1"):
        vflowopt.pixel_entropy(torch.full((1, 3, 14, 14), -0.2))
    with pytest.raises(MethodError, match=r"\(1, 3, 15, 14\)"):
        vflowopt.pixel_entropy(torch.zeros(1, 3, 15, 14))


def test_importance_of_an_unreachable_threshold_is_the_received_attention() -> None:
    maps = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    importance = vflowopt.importance_map(maps, 1e6)
    torch.testing.assert_close(importance, maps.mean(dim=(1, 2)))
    with pytest.raises(MethodError, match=r"alpha is 0\.5"):
        vflowopt.importance_map(maps, 2.0, alpha=0.5)


def _plain(
    features: torch.Tensor, importance: list[float], cell: list[int], retention: float, grid: float
) -> dict[int, torch.Tensor]:
    """Survivors and their features, token by token."""
    total = len(importance)
    low = round(total * (1 - retention)) + int(total / grid**2)
    cut = sorted(range(total), key=lambda i: (importance[i], i))[:low]
    out = {i: features[i] for i in range(total) if i not in set(cut)}
    for square in {cell[i] for i in cut}:
        mine = [i for i in cut if cell[i] == square]
        weight = sum(importance[i] for i in mine)
        merged = torch.stack([features[i] * importance[i] for i in mine]).sum(0) / weight
        out[max(mine, key=lambda i: importance[i])] = merged
    return out


@pytest.mark.parametrize(("retention", "grid"), [(0.3, 4.0), (0.1166, 3.39), (0.7, 2.5), (0.5, 30.0), (0.05, 5.7)])
def test_recycling_equals_a_plain_loop(retention: float, grid: float) -> None:
    features, importance, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, grid)
    merged = vflowopt.prune_and_recycle(features, importance, cell, retention, grid)
    expected = _plain(features, importance.tolist(), cell.tolist(), retention, grid)
    assert merged.source.tolist() == sorted(expected)
    for place, rows in zip(merged.source.tolist(), merged.features, strict=True):
        torch.testing.assert_close(rows, expected[place], rtol=1e-5, atol=1e-5)
    again = apply_merge(features, merged.merge_map, merged.source.numel())
    torch.testing.assert_close(again, merged.features, rtol=1e-5, atol=1e-6)
    weights = torch.zeros(merged.source.numel()).index_add(0, merged.merge_map.target, merged.merge_map.weight)
    torch.testing.assert_close(weights, torch.ones_like(weights))


def test_the_size_is_what_the_counts_say() -> None:
    features, importance, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, 4.0)
    merged = vflowopt.prune_and_recycle(features, importance, cell, 0.2, 4.0)
    total = features.shape[0]
    low = round(total * 0.8) + int(total / 16)
    cells = len(set(cell[importance.argsort()[:low]].tolist()))
    assert merged.source.numel() == total - low + cells


def test_views_have_cells_of_their_own() -> None:
    _, _, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, 100.0)
    assert torch.equal(cell, view)
    fractional = vflowopt.grid_cells(view[:81], row[:81], column[:81], 4.5)
    assert int(fractional.max()) == 3
    with pytest.raises(MethodError, match="grid is 0"):
        vflowopt.grid_cells(view, row, column, 0)


def test_keeping_everything() -> None:
    features, importance, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, 100.0)
    merged = vflowopt.prune_and_recycle(features, importance, cell, 1.0, 100.0)
    assert torch.equal(merged.features, features)
    assert vflowopt.select_important(importance, 1.0).tolist() == list(range(importance.numel()))
    # A finer grid recycles its extra tokens even then.
    cell = vflowopt.grid_cells(view, row, column, 5.0)
    fewer = vflowopt.prune_and_recycle(features, importance, cell, 1.0, 5.0)
    assert fewer.source.numel() <= features.shape[0]
    assert not torch.equal(apply_merge(features, fewer.merge_map, fewer.source.numel()), features)


def test_cells_without_importance_take_the_plain_mean() -> None:
    features = torch.arange(8.0).view(4, 2)
    cell = torch.zeros(4, dtype=torch.long)
    merged = vflowopt.prune_and_recycle(features, torch.tensor([0.0, 0.0, 0.0, 1.0]), cell, 0.25, 50.0)
    assert merged.source.tolist() == [0, 3]
    assert merged.features.tolist() == [[2.0, 3.0], [6.0, 7.0]]


def test_video_selection_counts_the_newline() -> None:
    importance = torch.rand(6 * 196, generator=torch.Generator().manual_seed(0))
    keep = vflowopt.select_important(importance, 0.25, separators=1)
    assert keep.numel() == 1177 - round(1177 * 0.75) - 1
    assert set(keep.tolist()) == set(importance.topk(keep.numel()).indices.tolist())
    assert vflowopt.select_important(importance[:4], 0.01, separators=1).tolist() == [int(importance[:4].argmax())]


@pytest.mark.parametrize(("average", "strategy"), vflowopt.STRATEGIES.items())
def test_released_ratios_meet_their_average(average: float, strategy: vflowopt.Strategy) -> None:
    first, second, third = strategy.ratios
    assert vflowopt.average_retention(strategy.ratios, (9, 18), 28) == pytest.approx(average, abs=5e-3)
    solved = vflowopt.last_ratio(average, first, second, (9, 18), 28)
    assert solved == pytest.approx(third, abs=1e-2)
    assert vflowopt.average_retention((first, second, solved), (9, 18), 28) == pytest.approx(average, abs=1e-12)


def test_last_ratio_is_limited() -> None:
    assert vflowopt.last_ratio(0.9, 0.5, 1.0, (9, 18), 28) == 1.0
    with pytest.raises(RetentionError, match=r"0\.1 cannot be reached"):
        vflowopt.last_ratio(0.1, 0.5, 1.0, (9, 18), 28)


FACTS = HostFacts("any", 28, 26, 25, False)
FOCUSED = "encoder.focused_attention@feature:34.76"


@pytest.mark.parametrize("average", [0.5, 0.25, 0.1])
def test_released_settings_follow_from_the_average(average: float) -> None:
    """They are used as they are; R3 solved from the constraint gives the average exactly."""
    settings = VFlowOpt(average).settings(FACTS)
    known = vflowopt.STRATEGIES[average]
    assert settings == known
    other = VFlowOpt(average, first=known.ratios[0]).settings(FACTS)
    assert other.ratios == pytest.approx(known.ratios, rel=1e-2)
    assert vflowopt.average_retention(other.ratios, (9, 18), 28) == pytest.approx(average)
    assert VFlowOpt(average).cuts(FACTS) == (9, 18)
    assert VFlowOpt(average).cuts(HostFacts("any", 32, 24, 22, True)) == (10, 20)
    assert vflowopt.average_retention(settings.ratios, (9, 18), 28) == pytest.approx(average, rel=5e-3)


@pytest.mark.parametrize("average", [0.02, 0.17, 0.35, 0.8, 1.0])
@pytest.mark.parametrize(("layers", "cuts"), [(28, (9, 18)), (5, (3, 4)), (36, (12, 24))])
def test_settings_in_between_keep_the_average(average: float, layers: int, cuts: tuple[int, int]) -> None:
    settings = vflowopt.nearest_strategy(average, cuts, layers)
    assert all(0 < ratio <= 1 for ratio in settings.ratios)
    assert 28 < settings.threshold < 40 and 11 < settings.grid < 18
    reached = vflowopt.average_retention(settings.ratios, cuts, layers)
    assert reached == pytest.approx(average) or (settings.ratios[2] == 1.0 and reached < average)


def _sample(layout: Layout, importance: torch.Tensor) -> TokenSample:
    features = torch.randn(layout.patches, 6, generator=torch.Generator().manual_seed(5))
    return TokenSample(features, layout, {FOCUSED: importance}, FACTS)


def test_videos_are_ranked_as_a_whole() -> None:
    layout = Layout.regular("video", 4, 7, 7, "end")
    importance = torch.rand(196, generator=torch.Generator().manual_seed(0))
    plan = VFlowOpt(0.25).plan_tokens(_sample(layout, importance))
    total = 197 - round(197 * (1 - 0.2651)) - 1
    assert plan.keep.tolist() == sorted(importance.topk(total).indices.tolist())
    assert plan.features is None and plan.merged is None
    rows = Layout.regular("video", 4, 7, 7, "row")
    kept = VFlowOpt(0.25).plan_tokens(_sample(rows, importance)).keep.numel()
    assert kept == 196 - round(196 * (1 - 0.2651))


def test_tiled_images_get_recycled_tokens() -> None:
    """The plan is that of the function on the whole sequence, newlines left to themselves."""
    cells = [torch.cartesian_prod(torch.tensor([v]), torch.arange(r), torch.arange(c + v)) for v, r, c in _GRIDS]
    layout = Layout.from_cells("image", [(9, 9), (8, 14)], torch.cat(cells))
    importance = torch.rand(layout.patches, generator=torch.Generator().manual_seed(1))
    sample = _sample(layout, importance)
    plan = VFlowOpt(0.25, grid=4.0).plan_tokens(sample)
    places = layout.patch_tokens
    cell = vflowopt.grid_cells(layout.view[places], layout.row[places], layout.column[places], 4.0)
    expected = vflowopt.prune_and_recycle(sample.features, importance, cell, 0.2651, 4.0, separators=8)
    assert torch.equal(plan.keep, expected.source)
    assert plan.features is not None and torch.equal(plan.features, expected.features)
    assert plan.merged is not None
    torch.testing.assert_close(
        apply_merge(sample.features, plan.merged, plan.keep.numel()), plan.features, rtol=1e-5, atol=1e-6
    )
    single = Layout.regular("image", 1, 27, 27)
    alone = VFlowOpt(0.25).plan_tokens(_sample(single, torch.rand(729)))
    assert alone.keep.numel() == 729 - round(729 * (1 - 0.2651)) and alone.merged is None


def test_negative_importance_weighs_nothing() -> None:
    features, importance, view, row, column = _picture()
    cell = vflowopt.grid_cells(view, row, column, 3.0)
    merged = vflowopt.prune_and_recycle(features, importance - 0.5, cell, 0.3, 3.0)
    assert bool((merged.merge_map.weight >= 0).all())
    sums = torch.zeros(merged.source.numel()).index_add(0, merged.merge_map.target, merged.merge_map.weight)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_cuts_inside_follow_the_map(models: Any) -> None:
    """The map of the tower, gathered along: each cut drops the least important of what is left."""
    model, _, inputs = models("llava_onevision")
    with torch.no_grad(), tokensieve.compress(model, "vflowopt:retention=0.25,threshold=1.5") as run:
        model(**inputs)
    method = run.methods[0]
    assert isinstance(method, VFlowOpt)
    settings = method.settings(run.facts)
    maps = _importance_maps(model, inputs, 1.5)
    for row, item in enumerate(run.history[0].items):
        importance = maps[row]
        entered = vflowopt.select_important(importance, settings.ratios[0], 1)
        assert torch.equal(item.keep, entered)
        left = entered
        for share, layer in zip(settings.ratios[1:], method.cuts(run.facts), strict=True):
            total = left.numel() + 1
            drop = round(total * (1 - share))
            left = left[importance[left].topk(left.numel() - drop).indices.sort().values]
            assert torch.equal(item.decoder[layer], left)


def _importance_maps(model: Any, inputs: Any, threshold: float) -> torch.Tensor:
    """Importance from eager attention maps of the projected layer, pooled as the frames are."""
    base = model.base_model
    pixels = inputs["pixel_values_videos"]
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    seen: list[torch.Tensor] = []
    layers = base.vision_tower.encoder.layers
    hook = layers[host_for(model).feature_layer(base)].self_attn.register_forward_hook(
        lambda module, args, output: seen.append(output[1])
    )
    with torch.no_grad():
        base.vision_tower(pixels.flatten(0, 1))
    hook.remove()
    model.set_attn_implementation(kernel)
    importance = vflowopt.importance_map(seen[0], threshold)
    side = int(importance.shape[1] ** 0.5)
    half = -(-side // 2)
    grid = torch.nn.functional.interpolate(importance.view(-1, 1, side, side), size=(half, half), mode="bilinear")
    return grid.view(pixels.shape[0], -1)


def test_pixel_entropy_is_that_of_the_picture(models: Any) -> None:
    """Normalised pixels are put back; the signal is the softmax over each picture, pooled."""
    model, _, inputs = models("llava_onevision")
    host = host_for(model)
    seen: list[TokenSample] = []

    class Spy(VFlowOpt):
        def plan_tokens(self, sample: TokenSample) -> Any:
            seen.append(sample)
            return super().plan_tokens(sample)

    with torch.no_grad(), tokensieve.compress(model, Spy(0.25, alpha=0.5)):
        model(**inputs)
    pixels = inputs["pixel_values_videos"][0]
    patch, side = model.config.vision_config.patch_size, host.side(model.base_model)  # type: ignore[attr-defined]
    levels = ((pixels * 0.5 + 0.5) * 255).round()[..., : side * patch, : side * patch]
    # Halves keep the flooring of the function away from rounding errors.
    entropy = vflowopt.pixel_entropy((levels + 0.5) / 255.5, patch).flatten(1).softmax(-1)
    half = -(-side // 2)
    pooled = torch.nn.functional.interpolate(entropy.view(-1, 1, side, side), size=(half, half), mode="bilinear")
    torch.testing.assert_close(seen[0].signal("encoder.pixel_entropy"), pooled.flatten())
    packed, _, _ = models("qwen2_vl")
    with pytest.raises(TokensieveError, match="packed patches instead of pictures"):
        tokensieve.compress(packed, "vflowopt:alpha=0.5")


def test_strategies_on_disk(tmp_path: Path) -> None:
    stored = StoredStrategy(vflowopt.STRATEGIES[0.25], 0.25, 28, (9, 18), "some/model", 0.97)
    path = tmp_path / "strategy.json"
    stored.save(path)
    assert StoredStrategy.load(path) == stored
    method = VFlowOpt(strategy=str(path))
    assert method.settings(FACTS) == stored.strategy and method.cuts(FACTS) == (9, 18)
    with pytest.raises(MethodError, match="found for an LLM of 28 layers, but this one has 32"):
        method.check_host(HostFacts("any", 32, 26, 25, False))
    with pytest.raises(MethodError, match="leave threshold"):
        VFlowOpt(strategy=str(path), grid=3.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not of the format"),
        ('{"format": "tokensieve-vflowopt-strategy-1"}', "no complete strategy"),
        (
            '{"format": "tokensieve-vflowopt-strategy-1", "retention": 0.2, "layers": 4, "cuts": [1, 2], "strategy": '
            '{"threshold": 1, "alpha": 0, "grid": 3, "ratios": [0.5, 2, 1]}}',
            "must lie in",
        ),
        (" " * (1 << 21), "larger than 1 MiB"),
    ],
)
def test_broken_strategies(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(MethodError, match=message):
        StoredStrategy.load(path)
    with pytest.raises(MethodError, match="cannot be read as JSON"):
        StoredStrategy.load(tmp_path / "missing.json")


@pytest.mark.parametrize("options", [{"threshold": -1.0}, {"grid": 0.0}, {"first": 1.5}, {"alpha": math.nan}])
def test_parameters_outside_of_their_range(options: dict[str, float]) -> None:
    with pytest.raises(MethodError):
        VFlowOpt(0.25, **options)  # type: ignore[arg-type]


def test_search_improves_and_resumes(models: Any, tmp_path: Path) -> None:
    """The best point beats the first ones; an interrupted search ends where a whole one does."""
    model, processor, _ = models("llava_onevision")
    samples = [dict(tiny.example_inputs("llava_onevision", processor))]
    seen: list[search.Progress] = []
    options = {"calls": 9, "initial": 4, "seed": 1}
    whole = search.search(model, samples, 0.25, progress=seen.append, name="tiny", **options)
    assert [entry.call for entry in seen] == list(range(1, 10))
    assert whole.value == seen[-1].best == max(entry.value for entry in seen)
    assert whole.value >= max(entry.value for entry in seen[:4])
    assert vflowopt.average_retention(whole.strategy.ratios, whole.cuts, whole.layers) <= 0.25 + 1e-9
    state = tmp_path / "search.json"
    search.search(model, samples, 0.25, state=state, calls=5, initial=4, seed=1)
    later: list[search.Progress] = []
    resumed = search.search(model, samples, 0.25, state=state, progress=later.append, name="tiny", **options)
    assert [entry.call for entry in later] == [6, 7, 8, 9]
    assert resumed == whole
    whole.save(tmp_path / "found.json")
    with torch.no_grad():
        full = search.last_states(model, samples)
        with tokensieve.compress(model, "vflowopt", strategy=str(tmp_path / "found.json")):
            pruned = search.last_states(model, samples)
    assert search.agreement(full, pruned) == pytest.approx(whole.value, abs=1e-6)
    with pytest.raises(MethodError, match="holds a search with other settings"):
        search.search(model, samples, 0.5, state=state, **options)


def test_search_refuses_what_it_cannot_use(models: Any) -> None:
    model, processor, _ = models("llava_onevision")
    with pytest.raises(MethodError, match="0 samples"):
        search.search(model, [], 0.25)
    with pytest.raises(MethodError, match="holds 2 prompts"):
        search.search(model, [dict(tiny.example_inputs("llava_onevision", processor, batch=2))], 0.25)
    assert search.agreement([torch.ones(3)] * 2, [torch.ones(3), torch.full((3,), math.nan)]) == pytest.approx(0.5)
