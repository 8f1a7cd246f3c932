"""The parts of PPLLaVA on their own: pooling, relevance maps, longer text contexts, the temporal branch."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
)

from tokensieve.errors import MethodError
from tokensieve.models.ppllava import (
    IMAGE_KERNEL,
    BTAdapterVisionModel,
    ClipAlignment,
    ExtendedTextEmbeddings,
    SiglipAlignment,
    cosine_map,
    extend_context,
    extend_positions,
    merge_tables,
    prompt_guided_pool,
    relevance_map,
    resize_relevance,
    resolve_window,
    split_tables,
)

WEIGHTINGS = ("window_softmax", "paper_raw", "window_renorm")
END = 59
"""End-of-text id of the tiny CLIP; it pads too."""


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _relevance(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A peaked map: with values far below the temperature the weights of a window would be flat."""
    return (4 * _draw(*shape, seed=seed, dtype=dtype)).flatten(-3).softmax(-1).view(shape)


def _average(features: Tensor, grid: tuple[int, int], kernel: Any, stride: Any = None) -> Tensor:
    maps = features.unflatten(1, grid).permute(3, 0, 1, 2)[None]
    return nn.functional.avg_pool3d(maps, kernel, stride)[0].permute(1, 2, 3, 0)


def _tiny(model: Any, config: Any, **text: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return model(
        config(
            text_config={**sizes, "vocab_size": END + 1, **text},
            vision_config={**sizes, "image_size": 12, "patch_size": 4},
        )
    ).eval()


@pytest.fixture
def clip() -> Any:
    model = _tiny(CLIPModel, CLIPConfig, eos_token_id=END)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight)
    return model


@pytest.fixture
def siglip() -> Any:
    model = _tiny(SiglipModel, SiglipConfig, max_position_embeddings=64)
    nn.init.constant_(model.logit_scale, 4.0)
    nn.init.constant_(model.logit_bias, -10.0)
    return model


def _prompt(*lengths: int, total: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts that end in the end-of-text id and are padded with it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, END - 1, (len(lengths), total), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, length - 1 :] = END
        mask[row, :length] = 1
    return ids, mask


class Allocations(TorchDispatchMode):
    """Sizes in bytes of all tensors that operations make, except views of those in ``known``."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


class TestGeometry:
    @pytest.mark.parametrize(
        ("size", "kernel", "output"),
        [
            ((32, 24, 24), None, (16, 8, 8)),
            ((64, 24, 24), None, (32, 8, 8)),
            ((32, 27, 27), None, (16, 9, 9)),
            ((1, 24, 24), IMAGE_KERNEL, (1, 8, 8)),
            ((5, 24, 24), IMAGE_KERNEL, (5, 8, 8)),
        ],
    )
    def test_published_token_counts(self, size: Any, kernel: Any, output: Any) -> None:
        features = torch.zeros(size[0], size[1] * size[2], 2)
        pooled = prompt_guided_pool(features, _relevance(*size), grid=size[1:], kernel=kernel)
        assert tuple(pooled.shape) == (*output, 2)
        tokens = {(16, 8, 8): 1024, (32, 8, 8): 2048, (16, 9, 9): 1296, (1, 8, 8): 64, (5, 8, 8): 320}[output]
        assert pooled.flatten(0, 2).shape[0] == tokens == resolve_window(size, kernel=kernel).tokens

    @pytest.mark.parametrize(
        ("given", "kernel", "stride", "output"),
        [
            ({"kernel": (2, 3, 3), "stride": (1, 2, 4)}, (2, 3, 3), (1, 2, 4), (7, 4, 3)),
            ({"stride": (2, 2, 2)}, (2, 2, 2), (2, 2, 2), (4, 5, 5)),
            ({"output_size": (4, 3, 4)}, (2, 4, 5), (2, 3, 2), (4, 3, 4)),
            ({"output_size": (8, 10, 11)}, (1, 1, 1), (1, 1, 1), (8, 10, 11)),
            ({"output_size": (1, 1, 1)}, (8, 10, 11), (8, 10, 11), (1, 1, 1)),
            ({"output_size": (4, 4, 4), "stride": (1, 2, 2)}, (5, 4, 5), (1, 2, 2), (4, 4, 4)),
            ({"output_size": (4, 4, 4), "kernel": (2, 2, 2)}, (2, 2, 2), (2, 2, 3), (4, 4, 4)),
            ({"output_size": (1, 4, 4), "kernel": (3, 2, 2)}, (3, 2, 2), (8, 2, 3), (1, 4, 4)),
            ({"output_size": (4, 3, 3), "kernel": (2, 3, 3), "stride": (2, 3, 3)}, (2, 3, 3), (2, 3, 3), (4, 3, 3)),
        ],
    )
    def test_every_parametrisation(self, given: Any, kernel: Any, stride: Any, output: Any) -> None:
        window = resolve_window((8, 10, 11), **given)
        assert (window.kernel, window.stride, window.output) == (kernel, stride, output)
        features = _draw(8, 110, 3)
        pooled = prompt_guided_pool(features, _relevance(8, 10, 11), grid=(10, 11), **given)
        assert tuple(pooled.shape) == (*output, 3)
        expected = _average(features, (10, 11), kernel, stride)[: output[0], : output[1], : output[2]]
        averaged = prompt_guided_pool(features, grid=(10, 11), **given)
        torch.testing.assert_close(averaged, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"kernel": (9, 3, 3)}, "8 frames have no room for windows of 9"),
            ({"kernel": (0, 3, 3)}, "three positive numbers"),
            ({"output_size": (4, 11, 4)}, "10 rows have no room"),
            ({"output_size": (4, 4, 4), "kernel": (8, 2, 2)}, "8 frames have no room"),
            ({"output_size": (4, 4, 4), "stride": (3, 2, 2)}, "8 frames have no room"),
            ({"output_size": (4, 3, 4), "kernel": (2, 3, 3), "stride": (2, 3, 3)}, "make 3 windows of 11 columns"),
        ],
    )
    def test_impossible_geometry(self, given: Any, words: str) -> None:
        with pytest.raises(MethodError, match=words):
            resolve_window((8, 10, 11), **given)

    def test_order_is_frame_row_column(self) -> None:
        places = torch.cartesian_prod(*(torch.arange(float(n)) for n in (4, 6, 9))).view(4, 54, 3)
        pooled = prompt_guided_pool(places, grid=(6, 9)).flatten(0, 2)
        centres = torch.cartesian_prod(torch.tensor([0.5, 2.5]), torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4, 7]))
        torch.testing.assert_close(pooled, centres)


class TestPooling:
    @pytest.mark.parametrize("weighting", ["window_softmax", "window_renorm"])
    def test_flat_maps_average(self, weighting: Any) -> None:
        features = _draw(4, 81, 8)
        expected = _average(features, (9, 9), (2, 3, 3))
        for flat in (torch.full((4, 9, 9), 1 / 324), torch.zeros(4, 9, 9)):
            pooled = prompt_guided_pool(features, flat, grid=(9, 9), weighting=weighting)
            torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)
            assert torch.equal(pooled, prompt_guided_pool(features, grid=(9, 9)))

    @pytest.mark.parametrize("weighting", ["window_softmax", "window_renorm"])
    def test_constant_features_stay(self, weighting: Any) -> None:
        row = _draw(8)
        pooled = prompt_guided_pool(row.expand(4, 81, 8), _relevance(4, 9, 9), grid=(9, 9), weighting=weighting)
        torch.testing.assert_close(pooled, row.expand_as(pooled), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("temperature", [1e-9, 1e-37])
    def test_low_temperature_takes_the_most_relevant(self, temperature: float) -> None:
        features, relevance = _draw(4, 81, 8), _relevance(4, 9, 9)
        pooled = prompt_guided_pool(features, relevance, grid=(9, 9), temperature=temperature)
        maps = features.unflatten(1, (9, 9))
        for t, row, column in itertools.product(range(2), range(3), range(3)):
            inside = (slice(2 * t, 2 * t + 2), slice(3 * row, 3 * row + 3), slice(3 * column, 3 * column + 3))
            best = relevance[inside].flatten().argmax()
            assert torch.equal(pooled[t, row, column], maps[inside].flatten(0, 2)[best])

    def test_weightings_by_their_formula(self) -> None:
        features, relevance = _draw(4, 81, 8), _relevance(4, 9, 9)
        cut = relevance.unfold(0, 2, 2).unfold(1, 3, 3).unfold(2, 3, 3).flatten(3)
        maps = features.unflatten(1, (9, 9)).unfold(0, 2, 2).unfold(1, 3, 3).unfold(2, 3, 3).flatten(4)
        shares = {
            "window_softmax": (cut / 0.01).softmax(-1),
            "paper_raw": cut,
            "window_renorm": cut / cut.sum(-1, keepdim=True),
        }
        for weighting, share in shares.items():
            pooled = prompt_guided_pool(features, relevance, grid=(9, 9), weighting=weighting)  # type: ignore[arg-type]
            torch.testing.assert_close(pooled, torch.einsum("trcw,trcdw->trcd", share, maps), rtol=0, atol=1e-6)
        assert not torch.allclose(shares["window_softmax"], shares["window_renorm"], atol=0.1)

    def test_renormalised_relevance_is_a_softmax_of_scaled_cosines(self) -> None:
        features, scaled = _draw(4, 81, 8), 4 * _draw(4, 9, 9, seed=2)
        relevance = scaled.flatten().softmax(0).view(4, 9, 9)
        renormalised = prompt_guided_pool(features, relevance, grid=(9, 9), weighting="window_renorm")
        guided = prompt_guided_pool(features, scaled, grid=(9, 9), temperature=1)
        torch.testing.assert_close(renormalised, guided, rtol=0, atol=1e-5)

    def test_kernel_of_one_changes_nothing(self) -> None:
        features = _draw(3, 20, 8)
        pooled = prompt_guided_pool(features, _relevance(3, 4, 5), grid=(4, 5), kernel=(1, 1, 1))
        assert torch.equal(pooled.flatten(1, 2), features)

    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    def test_batch_equals_rows(self, weighting: Any) -> None:
        features, relevance = _draw(3, 4, 81, 8), _relevance(3, 4, 9, 9)
        pooled = prompt_guided_pool(features, relevance, grid=(9, 9), weighting=weighting)
        for row in range(3):
            alone = prompt_guided_pool(features[row], relevance[row], grid=(9, 9), weighting=weighting)
            torch.testing.assert_close(pooled[row], alone, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_features_are_summed_in_float32(self, dtype: torch.dtype) -> None:
        features, relevance = _draw(4, 81, 64).to(dtype), _relevance(4, 9, 9)
        pooled = prompt_guided_pool(features, relevance, grid=(9, 9))
        assert pooled.dtype == dtype
        assert torch.equal(pooled, prompt_guided_pool(features.float(), relevance, grid=(9, 9)).to(dtype))

    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    @pytest.mark.parametrize("stride", [(2, 3, 3), (1, 2, 2), (2, 4, 3)])
    def test_gradients(self, weighting: Any, stride: Any) -> None:
        """Against finite differences: disjoint windows with a remainder, overlapping ones, ones with gaps."""
        features = _draw(1, 4, 35, 2, dtype=torch.float64).requires_grad_()
        relevance = _relevance(1, 4, 5, 7, dtype=torch.float64).requires_grad_()

        def pool(features: Tensor, relevance: Tensor) -> Tensor:
            options: Any = {"kernel": (2, 3, 3), "stride": stride, "weighting": weighting, "temperature": 0.5}
            return prompt_guided_pool(features, relevance, grid=(5, 7), **options)

        torch.autograd.gradcheck(pool, (features, relevance), fast_mode=True)

    @pytest.mark.parametrize("stride", [(2, 3, 3), (1, 2, 2)])
    def test_gradients_of_narrow_features(self, stride: Any) -> None:
        wide = _draw(4, 81, 16).bfloat16().float().requires_grad_()
        narrow = wide.detach().bfloat16().requires_grad_()
        relevance = _relevance(4, 9, 9)
        for features in (wide, narrow):
            pooled = prompt_guided_pool(features, relevance, grid=(9, 9), kernel=(2, 3, 3), stride=stride)
            pooled.backward(torch.ones_like(pooled))
        assert wide.grad is not None and narrow.grad is not None and narrow.grad.dtype == torch.bfloat16
        assert torch.equal(narrow.grad, wide.grad.bfloat16())

    def test_slabs_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        features, relevance = _draw(2, 9, 81, 8), _relevance(2, 9, 9, 9)
        options: Any = {"grid": (9, 9), "kernel": (3, 3, 3), "stride": (1, 3, 2)}
        results = []
        for limit in (1, 2 * 3 * 3 * 4 * 8, 2**30):
            monkeypatch.setattr("tokensieve.models.ppllava.pooling._SLAB", {"cpu": limit})
            leaf = features.clone().requires_grad_()
            pooled = prompt_guided_pool(leaf, relevance, **options)
            pooled.square().sum().backward()
            results.append((pooled.detach(), leaf.grad))
        for pooled, grad in results[1:]:
            assert torch.equal(pooled, results[0][0])
            torch.testing.assert_close(grad, results[0][1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_copy_of_the_features(self, dtype: torch.dtype) -> None:
        """Overlapping windows, whose unfolded copy would be four times the features."""
        features = _draw(8, 144, 256).to(dtype).requires_grad_()
        relevance = _relevance(8, 12, 12).requires_grad_()
        with Allocations(features) as forward:
            pooled = prompt_guided_pool(features, relevance, grid=(12, 12), kernel=(2, 4, 4), stride=(2, 3, 2))
        size = features.numel() * features.element_size()
        assert pooled.numel() * 4 <= size
        assert 0 < forward.largest <= pooled.numel() * 4
        with Allocations(features) as backward:
            pooled.sum().backward()
        assert 0 < backward.largest <= features.numel() * 4

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda f, s: prompt_guided_pool(f, s, grid=(9, 8)), r"not \[T, 72, D\]"),
            (lambda f, s: prompt_guided_pool(f[0], s, grid=(9, 9)), r"not \[T, 81, D\]"),
            (lambda f, s: prompt_guided_pool(f, s[:3], grid=(9, 9)), "one value per patch"),
            (lambda f, s: prompt_guided_pool(f, s, grid=(9, 9), temperature=0), "above 0"),
            (lambda f, s: prompt_guided_pool(f, s, grid=(9, 9), weighting="max"), "'max' is unknown"),
        ],
    )
    def test_bad_input(self, call: Any, words: str) -> None:
        with pytest.raises(MethodError, match=words):
            call(_draw(4, 81, 8), _relevance(4, 9, 9))


class TestAlignment:
    def test_maps(self) -> None:
        patches, text = _draw(3, 20, 8), _draw(8, seed=1)
        cosine = cosine_map(patches, text)
        torch.testing.assert_close(cosine, torch.cosine_similarity(patches, text[None, None], dim=-1))
        relevance = relevance_map(cosine.unflatten(-1, (4, 5)), 10.0)
        torch.testing.assert_close(relevance.flatten(), (10 * cosine).flatten().softmax(0))
        # float16 would overflow in the norm and underflow in the softmax.
        narrow = cosine_map((300 * patches).half(), text.half())
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, cosine, rtol=0, atol=2e-3)
        assert cosine_map(torch.zeros(1, 1, 8), text).tolist() == [[0.0]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(cosine_map(patches, text), cosine)

    def test_resized_maps_sum_to_one(self) -> None:
        relevance = _relevance(2, 3, 6, 6)
        torch.testing.assert_close(resize_relevance(relevance, (6, 6)), relevance)
        resized = resize_relevance(relevance, (4, 9))
        assert tuple(resized.shape) == (2, 3, 4, 9)
        torch.testing.assert_close(resized.sum((1, 2, 3)), torch.ones(2))
        torch.testing.assert_close(resized[0], resize_relevance(relevance[0], (4, 9)))

    def test_clip_embeds_as_the_pair_does(self, clip: Any) -> None:
        """Its patch side applied to the class token of the last layer is the image embedding of CLIP."""
        align = ClipAlignment.from_clip(clip)
        pixels = _draw(2, 3, 12, 12)
        last = clip.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(align.embed_patches(last[:, 0]), clip.get_image_features(pixels).pooler_output)
        ids, mask = _prompt(9, 30, total=77)
        expected = clip.get_text_features(ids, mask).pooler_output
        torch.testing.assert_close(align.embed_text(ids, mask), expected)
        assert not align.logit_scale.requires_grad and align.logit_scale.exp().item() == pytest.approx(14.285, abs=1e-3)

    def test_siglip_embeds_as_its_head_does(self, siglip: Any) -> None:
        """A frame of one patch gets all of the head's attention; without output projection that is its value."""
        head = siglip.vision_model.head
        nn.init.eye_(head.attention.out_proj.weight)
        nn.init.zeros_(head.attention.out_proj.bias)
        align = SiglipAlignment.from_siglip(siglip)
        features = _draw(5, 1, 32)
        expected = head(siglip.vision_model.post_layernorm(features))
        torch.testing.assert_close(align.embed_patches(features)[:, 0], expected)
        ids, mask = _prompt(9, 30, total=64)
        torch.testing.assert_close(align.embed_text(ids, mask), siglip.get_text_features(ids).pooler_output)

    @pytest.mark.parametrize("value_attention", [False, True])
    def test_siglip_probe(self, siglip: Any, value_attention: bool) -> None:
        align = SiglipAlignment.from_siglip(siglip, value_attention=value_attention)
        features, (ids, _) = _draw(3, 9, 32), _prompt(9, total=64)
        normed = align.clip_visual_ln(features)
        probe = align.clip_visual_head.probe.expand(3, -1, -1)
        _, expected = align.clip_visual_head.attention(probe, normed, normed, average_attn_weights=True)
        torch.testing.assert_close(align.probe_attention(features).mean(1), expected[:, 0])
        found = align(features, ids, grid=(3, 3))
        softmax = relevance_map(found.cosine, align.logit_scale.exp())
        if value_attention:
            softmax = 1000 * expected.view(3, 3, 3) * softmax
        torch.testing.assert_close(found.relevance, softmax)

    @pytest.mark.parametrize("kind", ["clip", "siglip"])
    def test_batch_equals_rows(self, kind: str, request: pytest.FixtureRequest) -> None:
        pair = request.getfixturevalue(kind)
        align: Any = ClipAlignment.from_clip(pair) if kind == "clip" else SiglipAlignment.from_siglip(pair)
        features = _draw(2, 3, 9, 32)
        ids, mask = _prompt(9, 30, total=64)
        found = align(features, ids, mask, grid=(3, 3))
        torch.testing.assert_close(found.relevance.sum((1, 2, 3)), torch.ones(2))
        for row in range(2):
            alone = align(features[row], ids[row : row + 1], mask[row : row + 1], grid=(3, 3))
            torch.testing.assert_close(found.cosine[row], alone.cosine, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.relevance[row], alone.relevance, rtol=0, atol=1e-5)

    def test_bfloat16_maps_are_float32(self, clip: Any) -> None:
        features, (ids, mask) = _draw(3, 9, 32), _prompt(9, total=64)
        wide = ClipAlignment.from_clip(clip)(features, ids, mask, grid=(3, 3))
        found = ClipAlignment.from_clip(clip.bfloat16())(features.bfloat16(), ids, mask, grid=(3, 3))
        assert found.cosine.dtype == found.relevance.dtype == torch.float32
        torch.testing.assert_close(found.relevance.sum(), torch.tensor(1.0))
        torch.testing.assert_close(found.cosine, wide.cosine, rtol=0, atol=0.05)

    def test_question_guides_the_tokens(self, clip: Any) -> None:
        align = ClipAlignment.from_clip(extend_context(clip))
        features, projected = _draw(4, 9, 32), _draw(4, 9, 16, seed=3)
        tokens = []
        for seed in (0, 1):
            ids, mask = _prompt(100, total=248, seed=seed)
            found = align(features, ids, mask, grid=(3, 3))
            assert tuple(found.relevance.shape) == (4, 3, 3)
            tokens.append(prompt_guided_pool(projected, found.relevance, grid=(3, 3)))
        assert (tokens[0] - tokens[1]).abs().max() > 1e-3

    def test_gradients_reach_projections_and_norm(self, clip: Any) -> None:
        align = ClipAlignment.from_clip(clip)
        features, (ids, mask) = _draw(4, 9, 32), _prompt(9, total=64)
        relevance = align(features, ids, mask, grid=(3, 3)).relevance
        prompt_guided_pool(_draw(4, 9, 16, seed=3), relevance, grid=(3, 3)).square().sum().backward()
        for module in (align.clip_visual_ln, align.clip_visual_projection, align.clip_text_projection):
            assert module.weight.grad is not None and module.weight.grad.abs().sum() > 0
        assert clip.visual_projection.weight.grad is None

    def test_bad_input(self, clip: Any) -> None:
        align = ClipAlignment.from_clip(clip)
        ids, mask = _prompt(9, 9, total=64)
        with pytest.raises(MethodError, match="one row of token ids per clip"):
            align(_draw(3, 9, 32), ids, mask, grid=(3, 3))
        with pytest.raises(MethodError, match="without class token"):
            align(_draw(3, 10, 32), ids[:1], mask[:1], grid=(3, 3))


class TestContext:
    def test_worked_values(self) -> None:
        old = _draw(77, 6)
        new = extend_positions(old)
        assert new.shape[0] == 248 and extend_positions(_draw(64, 6)).shape[0] == 196
        assert torch.equal(new[:20], old[:20]) and torch.equal(new[20::4], old[20:])
        for row, expected in {
            21: 0.75 * old[20] + 0.25 * old[21],
            23: 0.25 * old[20] + 0.75 * old[21],
            243: 0.25 * old[75] + 0.75 * old[76],
            247: old[76] + 0.75 * (old[76] - old[75]),
        }.items():
            torch.testing.assert_close(new[row], expected)

    def test_trivial_stretches(self) -> None:
        old = _draw(10, 4)
        assert torch.equal(extend_positions(old, keep=10), old)
        assert torch.equal(extend_positions(old, keep=0, ratio=1), old)
        for keep, ratio in ((11, 4), (-1, 4), (5, 0)):
            with pytest.raises(MethodError, match=f"keep is {keep} and ratio {ratio}"):
                extend_positions(old, keep, ratio)
        with pytest.raises(MethodError, match="two rows"):
            extend_positions(old[:1])

    @pytest.mark.parametrize(("kind", "short", "long"), [("clip", 77, 248), ("siglip", 64, 196)])
    def test_towers_read_longer_prompts(self, kind: str, short: int, long: int, request: pytest.FixtureRequest) -> None:
        pair = request.getfixturevalue(kind)
        early, late = (_prompt(length, total=length)[0] for length in (20, long))
        expected = pair.text_model(early).pooler_output
        with pytest.raises(ValueError, match=f"{short}"):
            pair.text_model(late)
        tokens = pair.text_model.embeddings.token_embedding.weight
        assert extend_context(pair) is pair
        assert pair.text_model.embeddings.token_embedding.weight is tokens
        assert pair.text_model.config.max_position_embeddings == long
        assert pair.config.text_config.max_position_embeddings == long
        assert torch.equal(pair.text_model(early).pooler_output, expected)
        assert tuple(pair.text_model(late).pooler_output.shape) == (1, 32)
        with pytest.raises(MethodError, match=f"{long + 1} tokens"):
            pair.text_model(torch.ones(1, long + 1, dtype=torch.long))
        with pytest.raises(MethodError, match="two position tables already"):
            extend_context(pair)

    @pytest.mark.parametrize("kind", ["clip", "siglip"])
    def test_merged_towers_survive_a_checkpoint(self, kind: str, request: Any, tmp_path: Any) -> None:
        pair = extend_context(request.getfixturevalue(kind))
        embeddings = pair.text_model.embeddings
        # As after training: the copies differ where both are in use and where they are not.
        for seed, table in enumerate((embeddings.position_embedding, embeddings.position_embedding_res)):
            table.data += _draw(*table.shape, seed=seed)
        ids, mask = _prompt(150, total=196)
        expected = pair.text_model(ids, mask).last_hidden_state
        merge_tables(pair).save_pretrained(tmp_path)
        assert isinstance(pair.text_model.embeddings.position_embedding, nn.Embedding)
        loaded = type(pair).from_pretrained(tmp_path)
        assert torch.equal(loaded.text_model(ids, mask).last_hidden_state, expected)
        split_tables(loaded)
        assert torch.equal(loaded.text_model(ids, mask).last_hidden_state, expected)
        with pytest.raises(MethodError, match="nothing to merge"):
            merge_tables(pair)

    def test_published_names(self, clip: Any) -> None:
        text = CLIPTextModel(clip.config.text_config)
        extend_context(text)
        names = {name for name in text.state_dict() if name.startswith("embeddings.")}
        assert names == {
            "embeddings.token_embedding.weight",
            "embeddings.position_embedding",
            "embeddings.position_embedding_res",
        }
        other = split_tables(merge_tables(extend_context(CLIPTextModel(type(clip.config.text_config)(**TEXT)))))
        other.load_state_dict(text.state_dict(), strict=True)
        ids, mask = _prompt(150, total=248)
        assert torch.equal(other.eval()(ids, mask).pooler_output, text.eval()(ids, mask).pooler_output)

    def test_only_later_rows_learn(self) -> None:
        embeddings = ExtendedTextEmbeddings(nn.Embedding(7, 4), _draw(30, 4))
        embeddings(torch.zeros(1, 30, dtype=torch.long)).sum().backward()
        learned = embeddings.position_embedding_res.grad
        assert embeddings.position_embedding.grad is None and learned is not None
        assert learned[:20].abs().sum() == 0 and torch.equal(learned[20:], torch.ones(10, 4))
        embedded = embeddings(inputs_embeds=torch.zeros(1, 5, 4), position_ids=torch.arange(25, 30)[None])
        assert torch.equal(embedded[0], embeddings.weight[25:])
        with pytest.raises(MethodError, match="neither input_ids nor inputs_embeds"):
            embeddings()

    def test_other_models_are_refused(self) -> None:
        with pytest.raises(MethodError, match="Linear has no text embeddings"):
            extend_context(nn.Linear(2, 2))


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": END + 1,
    "eos_token_id": END,
}


class TestAdapter:
    @pytest.fixture
    def plain(self) -> CLIPVisionModel:
        torch.manual_seed(0)
        sizes = {**TEXT, "num_hidden_layers": 4, "image_size": 12, "patch_size": 4}
        sizes = {name: value for name, value in sizes.items() if name not in ("vocab_size", "eos_token_id")}
        return CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()

    @pytest.fixture
    def tower(self, plain: CLIPVisionModel) -> BTAdapterVisionModel:
        tower = BTAdapterVisionModel(plain, depth=2, max_frames=8)
        for layer in tower.vision_model.btadapter_T_layers:
            nn.init.normal_(layer.temporal_fc.weight, std=0.2)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(tower.vision_model.btadapter_time_embed.weight)
        return tower.eval()

    def test_states_before_the_branch_are_those_of_clip(self, plain: Any, tower: Any) -> None:
        pixels = _draw(3, 3, 12, 12)
        expected = plain(pixels, output_hidden_states=True).hidden_states
        found = tower(pixels).hidden_states
        assert len(found) == len(expected) == 5
        for before, after in zip(expected[:3], found[:3], strict=True):
            torch.testing.assert_close(before, after)
        for before, after in zip(expected[3:], found[3:], strict=True):
            torch.testing.assert_close(before[:, 0], after[:, 0])
            assert (before[:, 1:] - after[:, 1:]).abs().max() > 1e-2

    def test_zero_projection_makes_temporal_layers_identities(self, tower: Any) -> None:
        pixels, order = _draw(4, 3, 12, 12), torch.tensor([2, 0, 3, 1])
        mixed = tower(pixels).last_hidden_state
        branch = tower.vision_model
        for layer in branch.btadapter_T_layers:
            nn.init.zeros_(layer.temporal_fc.weight)
            assert layer(_draw(1, 9, 4, 32)).abs().sum() == 0
        still = tower(pixels).last_hidden_state
        assert (still - mixed).abs().max() > 1e-2
        # Without time embeddings nothing tells the frames apart any more.
        nn.init.zeros_(branch.btadapter_time_embed.weight)
        torch.testing.assert_close(tower(pixels[order]).last_hidden_state, tower(pixels).last_hidden_state[order])

    def test_last_adapter_layer_stays_out_of_the_layer_before_the_last(self, tower: Any) -> None:
        pixels = _draw(4, 3, 12, 12)
        before = tower(pixels)
        nn.init.normal_(tower.vision_model.btadapter_S_layers[-1].mlp.fc2.weight)
        after = tower(pixels)
        assert torch.equal(before.hidden_states[-2], after.hidden_states[-2])
        assert (before.last_hidden_state - after.last_hidden_state).abs().max() > 1e-2
        assert (before.pooler_output - after.pooler_output).abs().max() > 1e-2

    @pytest.mark.parametrize("frames", [1, 3])
    def test_batch_equals_rows(self, tower: Any, frames: int) -> None:
        """Three frames too: the count of channels must not be taken for the count of frames."""
        pixels = _draw(2, frames, 3, 12, 12)
        found = tower(pixels)
        for row in range(2):
            alone = tower(pixels[row])
            here = slice(row * frames, (row + 1) * frames)
            torch.testing.assert_close(found.last_hidden_state[here], alone.last_hidden_state, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.pooler_output[here], alone.pooler_output, rtol=0, atol=1e-5)

    def test_drop_path_in_training_only(self, tower: Any) -> None:
        pixels = _draw(2, 3, 12, 12)
        tower.vision_model.drop_path = [0.5, 0.5]
        assert torch.equal(tower(pixels).pooler_output, tower(pixels).pooler_output)
        tower.train()
        torch.manual_seed(0)
        outputs = [tower(pixels).pooler_output for _ in range(8)]
        assert any(not torch.equal(outputs[0], other) for other in outputs[1:])

    def test_new_branch(self, plain: CLIPVisionModel) -> None:
        branch = BTAdapterVisionModel(plain).vision_model
        assert len(branch.btadapter_S_layers) == 4 and branch.btadapter_time_embed.num_embeddings == 64
        assert branch.drop_path == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
        for copied, layer in zip(branch.btadapter_S_layers, branch.encoder.layers, strict=True):
            for own, original in zip(copied.parameters(), layer.parameters(), strict=True):
                assert own is not original and torch.equal(own, original)

    def test_bad_input(self, plain: Any, tower: Any) -> None:
        with pytest.raises(MethodError, match="9 frames"):
            tower(_draw(9, 3, 12, 12))
        with pytest.raises(MethodError, match="pixel_values has the shape"):
            tower(_draw(3, 12, 12))
        with pytest.raises(MethodError, match="choose 1 to 4"):
            BTAdapterVisionModel(plain, depth=5)


def test_benchmark_in_miniature(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(str(root))
    threads = torch.get_num_threads()
    benchmark = importlib.import_module("benchmarks.ppllava_pooling")
    try:
        sizes = ["--frames", "4", "--side", "6", "--width", "8"]
        assert benchmark.main(["--quick", *sizes, "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "ppllava_pooling.json").read_text())
    assert len(found["seconds"]) == 6 and all(len(times["both"]) == 2 for times in found["seconds"].values())
    assert set(found["peak_bytes"]) == set(found["seconds"])
    features, relevance = _draw(4, 36, 8), torch.full((4, 6, 6), 1 / 144)
    calls = benchmark.contestants(features, relevance, 6)
    averages = {name: call().flatten() for name, call in calls.items() if name != "guided: paper_raw"}
    averages["average: avg_pool3d of a permuted view"] = _average(features, (6, 6), (2, 3, 3)).flatten()
    for name, result in averages.items():
        torch.testing.assert_close(result, averages[benchmark.MEAN], rtol=0, atol=1e-6, msg=name)
