"""Recoverable Compression: fall back, order, and what the corrected form promises beyond the released one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.registry import build
from tokensieve.errors import MethodError, SignalError
from tokensieve.hosts import tiny
from tokensieve.methods import recoverable_compression as rc
from tokensieve.ops.merge import apply_merge
from tokensieve.pairing import load_pair


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


# -- the method on models ------------------------------------------------------------------------------------

NAME = "recoverable-compression"


@pytest.mark.parametrize("official", [False, True])
def test_sequence_of_llava(tiny_host: Any, official: bool) -> None:
    """What the LLM reads equals the functions on the states of the host's own tower, through its projector."""
    model, processor = tiny_host("llava")
    inputs = tiny.example_inputs("llava", processor)
    pair_model, tokenizer = tiny.pair_of(model)
    pair = load_pair(pair_model, tokenizer)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), tokensieve.compress(model, NAME, text_tower=pair, official=official) as run:
        handle = model.base_model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    base = model.base_model
    attention = base.vision_tower.get_submodule("encoder.layers")[-1].self_attn
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        getattr(attention, f"{part}_proj").register_forward_hook(
            lambda m, a, out, part=part: outputs.update({part: out})
        )
        for part in ("q", "k")
    ]
    with torch.no_grad():
        states = base.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    ids = tokenizer(["What happens in the video?"], return_tensors="pt", padding="max_length", max_length=77)
    with torch.no_grad():
        text = pair_model.text_projection(pair_model.text_model(**ids).last_hidden_state[:, -1])
        similarity = rc.text_similarity(states[-1], pair_model.visual_projection.weight, text)
        found = rc.compress(states[-2][0], outputs["q"][0], outputs["k"][0], similarity[0, 0], official=official)
        expected = base.multi_modal_projector(found.features)
    placeholder = int((inputs["input_ids"][0] == model.config.image_token_id).long().argmax())
    torch.testing.assert_close(seen[0][placeholder : placeholder + expected.shape[0]], expected, atol=1e-5, rtol=1e-4)
    text_tokens = int((inputs["input_ids"][0] != model.config.image_token_id).sum())
    assert seen[0].shape[0] == expected.shape[0] + text_tokens
    (item,) = run.history[-1].items
    assert item.keep[: found.kept.numel()].tolist() == found.kept.tolist()
    assert len(set(item.keep.tolist())) == expected.shape[0]


def test_merge_map_makes_the_tokens() -> None:
    features, keys, attention, similarity = _with_centres()
    selection = rc.select_outliers(attention, similarity)
    for official in (False, True):
        found = rc.merge_rest(features, keys, attention, selection, official=official)
        made = apply_merge(features, found.merge_map, found.features.shape[0])
        torch.testing.assert_close(made, found.features)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
def test_batches_and_generation(tiny_host: Any, family: str) -> None:
    """Every frame has its own number of tokens; rows of a padded batch equal rows alone."""
    model, processor = tiny_host(family)
    options = {"text_tower": load_pair(*tiny.pair_of(model)), "filter_neighbours": 5, "centre_neighbours": 5}
    batch = tiny.example_inputs(family, processor, batch=2)
    with torch.no_grad(), tokensieve.compress(model, NAME, **options) as run:
        together = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
        items = run.history[-1].items
        for row in range(2):
            alone = tiny.example_inputs(family, processor, batch=2, row=row)
            text = model.generate(**alone, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, -4:]
            assert torch.equal(together[row], text)
            assert torch.equal(run.history[-1].items[0].keep, items[row].keep)
    for item in items:
        assert 1 <= item.keep.numel() < item.layout.patches
        assert set(item.layout.patch_view[item.keep].tolist()) == set(range(len(item.layout.views)))


def test_another_question_recovers_other_tokens(tiny_host: Any) -> None:
    model, processor = tiny_host("llava")
    inputs = tiny.example_inputs("llava", processor)
    pair = load_pair(*tiny.pair_of(model))
    found = []
    for question in ("Where is the dog?\nAnswer with one word.", "Where is the dog?", "How many players are there?"):
        with torch.no_grad(), tokensieve.compress(model, NAME, text_tower=pair, question=question) as run:
            model(**inputs)
        found.append(run.history[-1].items[0].info)
    assert torch.equal(found[0]["question_similarity"], found[1]["question_similarity"]), "the first line counts"
    assert torch.equal(found[0]["visual"], found[2]["visual"])
    assert not torch.allclose(found[0]["question_similarity"], found[2]["question_similarity"])


def test_hosts_without_class_token_or_pair(tiny_host: Any) -> None:
    model, _ = tiny_host("llava_onevision")
    with pytest.raises(SignalError, match="no class token"):
        tokensieve.compress(model, NAME, text_tower=load_pair(*tiny.pair_of(model)))
    model, _ = tiny_host("llava")
    with pytest.raises(SignalError, match="no CLIP tower of which the text half is known"):
        tokensieve.compress(model, NAME)
    with pytest.raises(MethodError, match="merged is 0"):
        build(NAME, {"merged": 0})
