"""FasterVLM: ranking, equal shares per view, the tower layer it reads, and towers without class token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError, RetentionError, SignalError
from tokensieve.hosts import tiny
from tokensieve.methods.fastervlm import FasterVLM, rank_patches

SIGNAL = "encoder.class_attention@feature"


def _sample(layout: Layout, seed: int = 0, budget: torch.Tensor | None = None) -> TokenSample:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layout.patches, generator=generator)
    return TokenSample(torch.randn(layout.patches, 6), layout, {SIGNAL: scores}, budget=budget)


@pytest.fixture(scope="module")
def clip_host() -> tuple[Any, Any]:
    """A host with a class token whose projected layer is not its last one."""
    model, processor = tiny.load("llava")
    return model.eval(), tiny.example_inputs("llava", processor)


def _kept(model: Any, inputs: Any, **options: Any) -> list[int]:
    with torch.no_grad(), tokensieve.compress(model, "fastervlm", retention=0.3, **options) as run:
        model(**inputs)
    return run.history[-1].items[0].keep.tolist()


def test_heads_and_scale_do_not_matter() -> None:
    attention = torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(0))
    kept = rank_patches(attention, 9)
    assert torch.equal(kept, rank_patches(attention[:, [2, 0, 3, 1]], 9))
    assert torch.equal(kept, rank_patches(attention * torch.tensor([0.1, 3.0, 7.0])[:, None, None], 9))
    assert torch.equal(kept, rank_patches(attention.mean(dim=1), 9))


def test_keeping_all_and_ties() -> None:
    attention = torch.ones(2, 3, 8)
    assert rank_patches(attention, 8).tolist() == [list(range(8))] * 2
    assert rank_patches(attention, 3).tolist() == [[0, 1, 2]] * 2
    for keep in (0, 9):
        with pytest.raises(MethodError, match=f"cannot keep {keep} of 8"):
            rank_patches(attention, keep)
    with pytest.raises(MethodError, match=r"\(8,\)"):
        rank_patches(attention[0, 0], 3)


@pytest.mark.parametrize(("retention", "each"), [(0.25, 4), (0.1, 2), (0.01, 1), (0.9, 14)])
def test_every_frame_keeps_equally_many(retention: float, each: int) -> None:
    layout = Layout.regular("video", 5, 4, 4, "row")
    method, sample = FasterVLM(retention=retention), _sample(layout)
    plan = method.plan_tokens(sample)
    assert torch.bincount(plan.keep // 16).tolist() == [each] * 5
    assert method.token_count(layout) == plan.keep.numel() == 5 * each
    scores = sample.signal(SIGNAL).view(5, 16)
    expected = rank_patches(scores, each) + torch.arange(5)[:, None] * 16
    assert torch.equal(plan.keep, expected.flatten())


def test_views_of_different_sizes_and_frame_budgets() -> None:
    cells = torch.cartesian_prod(torch.tensor([0]), torch.arange(4), torch.arange(4))
    mosaic = torch.cartesian_prod(torch.tensor([1]), torch.arange(6), torch.arange(8))
    layout = Layout.from_cells("image", [(4, 4), (6, 7)], torch.cat((cells, mosaic)))
    plan = FasterVLM(retention=0.5).plan_tokens(_sample(layout))
    assert torch.bincount(layout.patch_view[plan.keep]).tolist() == [8, 21]
    video = Layout.regular("video", 3, 4, 4)
    method = FasterVLM(retention=0.25, budget="vidcom2")
    plan = method.plan_tokens(_sample(video, budget=torch.tensor([1, 7, 4])))
    assert torch.bincount(plan.keep // 16).tolist() == [1, 7, 4]
    assert method.token_count(video) is None


def test_it_reads_the_projected_layer(clip_host: tuple[Any, Any]) -> None:
    """The row of the class token in the layer whose output is projected, as the tower itself computes it."""
    model, inputs = clip_host
    facts = tokensieve.host_for(model).facts(model.model)
    assert facts.feature_layer == facts.tower_layers - 2
    kept = _kept(model, inputs)
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation(before)
    assert len(out.hidden_states) == len(out.attentions) + 1
    rows = out.attentions[model.config.vision_feature_layer][:, :, 0, 1:]
    assert rank_patches(rows, len(kept))[0].tolist() == kept
    assert _kept(model, inputs, layer=facts.feature_layer) == kept
    assert _kept(model, inputs, layer=facts.tower_layers - 1) != kept


def test_kernels_agree(clip_host: tuple[Any, Any]) -> None:
    model, inputs = clip_host
    before = model.config._attn_implementation
    outputs = []
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        with torch.no_grad(), tokensieve.compress(model, "fastervlm", retention=0.3) as run:
            logits = model(**inputs).logits[:, -1]
        outputs.append((run.history[-1].items[0].keep.tolist(), logits))
    model.set_attn_implementation(before)
    assert outputs[0][0] == outputs[1][0]
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-4, atol=2e-5)


def test_towers_without_class_token_need_a_choice() -> None:
    model, processor = tiny.load("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor)
    with pytest.raises(SignalError, match=r"fastervlm needs encoder\.class_attention.*no class token"):
        tokensieve.compress(model, "fastervlm")
    with torch.no_grad(), tokensieve.compress(model, "fastervlm:signal=received", retention=0.3) as run:
        model(**inputs)
    item = run.history[-1].items[0]
    assert item.keep.numel() == FasterVLM(retention=0.3).token_count(item.layout)


def test_bad_options() -> None:
    with pytest.raises(MethodError, match="not 'values'"):
        FasterVLM(signal="values")  # type: ignore[arg-type]
    with pytest.raises(RetentionError):
        FasterVLM(retention=0.0)
