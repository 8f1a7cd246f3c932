"""PPLLaVA as a model: counts, questions, batches, generation, saving."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ppllava_tiny import GRID, build, pair, question_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    SiglipVisionConfig,
)

from tokensieve.errors import HostError, MethodError
from tokensieve.models.ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, prompt_guided_pool, register

ASK = ("Where is the red ball?", "What does the woman do while the soup cooks?")


def _clip(frames: int = 4, seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


def _prompt(processor: Any, question: str, *kinds: str) -> str:
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def _inputs(processor: Any, questions: Any = ASK[:1], clips: Any = None, **options: Any) -> dict[str, Any]:
    texts = [_prompt(processor, question, "video") for question in questions]
    videos = [_clip()] * len(texts) if clips is None else clips
    return dict(processor(text=texts, videos=videos, padding_side="left", **options))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["clip", "siglip"])
def either(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(scope="module")
def clip_model() -> Any:
    return build()


class TestTokenCounts:
    @pytest.mark.parametrize(
        ("image_size", "frames", "tokens"), [(96, 32, 1024), (96, 64, 2048), (108, 32, 1296)], ids=str
    )
    def test_full_grids(self, image_size: int, frames: int, tokens: int) -> None:
        """32 frames of 24 x 24 patches, 64 of them, and 32 of SigLIP's 27 x 27."""
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        siglip = image_size == 108
        vision: Any = SiglipVisionConfig if siglip else CLIPVisionConfig
        strategy = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"} if siglip else {}
        extra = {"vision_use_head": False} if siglip else {}
        config = PPLlavaConfig(
            vision_config=vision(**sizes, image_size=image_size, patch_size=4, **extra),
            text_config=LlamaConfig(**sizes, vocab_size=16),
            prompt_config={
                "model_type": "siglip_text_model" if siglip else "clip_text_model",
                **sizes,
                "vocab_size": 16,
                "max_position_embeddings": 196 if siglip else 248,
                **({"projection_size": 8} if siglip else {}),
            },
            projection_dim=8,
            image_token_id=14,
            video_token_id=15,
            **strategy,
        )
        model = PPLlavaForConditionalGeneration(config).eval()
        pixels = torch.zeros(1, frames, 3, image_size, image_size)
        question = torch.ones(1, 4, dtype=torch.long)
        found = model.model.get_video_features(pixels, question, torch.ones_like(question))
        assert [tuple(part.shape) for part in found.pooler_output] == [(tokens, 8)]
        side = image_size // 4
        assert tuple(found.cosines[0].shape) == (1, frames, side, side)

    def test_base_view_is_64_tokens(self) -> None:
        """An image of 24 x 24 patches that is not cut: 64 tokens and a newline; several images: 64 each."""
        config = PPLlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=96,
                patch_size=4,
            ),
            text_config=LlamaConfig(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16
            ),
            prompt_config={
                "model_type": "clip_text_model",
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "vocab_size": 16,
                "max_position_embeddings": 248,
            },
            projection_dim=8,
            image_token_id=14,
            video_token_id=15,
            image_grid_pinpoints=[],
        )
        model = PPLlavaForConditionalGeneration(config).eval()
        question = torch.ones(2, 4, dtype=torch.long)
        found = model.model.get_image_features(
            torch.rand(4, 1, 3, 96, 96), torch.full((4, 2), 50), question, None, torch.tensor([1, 3])
        )
        assert [part.shape[0] for part in found.pooler_output] == [65, 64, 64, 64]
        assert torch.equal(found.pooler_output[0][-1], model.model.image_newline)
        assert [tuple(part.shape) for part in found.cosines] == [(1, 1, 24, 24), (1, 3, 24, 24)]

    @pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
    def test_short_clips(self, clip_model: Any, frames: int) -> None:
        """T = 4: floor((4 - 2) / 2 + 1) * 16; one frame is pooled in space alone."""
        model, processor = clip_model
        inputs = _inputs(processor, clips=[_clip(frames)])
        tokens = int((inputs["input_ids"] == model.config.video_token_id).sum())
        assert tokens == max(1, (frames - 2) // 2 + 1) * 16
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


class TestQuestions:
    def test_changing_only_the_question_changes_the_tokens(self, either: Any) -> None:
        model, processor = either
        inputs = _inputs(processor, ASK)
        found = model.model.get_video_features(
            *(inputs[name] for name in ("pixel_values_videos", "question_ids", "question_mask")),
            batch_num_videos=inputs["batch_num_videos"],
            video_index=inputs["video_index"],
        )
        first, second = found.pooler_output
        assert first.shape == second.shape == (32, 32)
        assert not torch.allclose(first, second, atol=1e-5)
        assert not torch.allclose(found.cosines[0], found.cosines[1], atol=1e-3)

    def test_tokens_follow_from_the_parts(self, either: Any) -> None:
        """Tower, alignment and pooling by hand."""
        model, processor = either
        inputs, inner = _inputs(processor), model.model
        states = inner.vision_tower(inputs["pixel_values_videos"][0], output_hidden_states=True)
        features = states.hidden_states[-2][:, 1:] if model.config.pair == "clip" else states.hidden_states[-2]
        grid = (GRID, GRID)
        found = inner.prompt_alignment(features, inputs["question_ids"], inputs["question_mask"], grid=grid)
        expected = prompt_guided_pool(inner.multi_modal_projector(features), found.relevance, grid=grid).flatten(0, 2)
        output = inner.get_video_features(
            *(inputs[name] for name in ("pixel_values_videos", "question_ids", "question_mask"))
        )
        torch.testing.assert_close(output.pooler_output[0], expected, rtol=0, atol=1e-6)
        shown = model(**inputs, output_visual_attention=True).visual_attention
        torch.testing.assert_close(shown[0][0], found.cosine, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.relevance.sum(), torch.tensor(1.0))

    def test_several_questions_encode_a_clip_once(self, clip_model: Any) -> None:
        model, processor = clip_model
        inputs = _inputs(processor, (*ASK, "Describe the scene in detail."))
        assert inputs["pixel_values_videos"].shape[0] == 1
        calls: list[int] = []
        handle = model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
        together = model(**inputs).logits
        handle.remove()
        assert calls == [1]
        for row, question in enumerate((*ASK, "Describe the scene in detail.")):
            alone = _inputs(processor, [question])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(together[row, -length:], model(**alone).logits[0], rtol=0, atol=1e-5)

    def test_average_needs_no_question(self, clip_model: Any) -> None:
        model, processor = build(weighting="average")
        inputs = _inputs(processor)
        with_question = model(**inputs).logits
        del inputs["question_ids"], inputs["question_mask"]
        assert torch.equal(model(**inputs).logits, with_question)
        guided = clip_model[0]
        with pytest.raises(HostError, match="question_ids are missing"):
            guided(**inputs)

    def test_unknown_weighting(self) -> None:
        model, processor = build(weighting="none")
        with pytest.raises(MethodError, match="weighting 'none' is unknown"):
            model(**_inputs(processor))


class TestBatches:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_mixed_batch_equals_rows(self, either: Any, side: str) -> None:
        """A video, an image, three images, and text alone, of different lengths."""
        model, processor = either
        pictures = [_clip(1, seed)[0] for seed in range(3)] + [_clip(1, 5, 90, 30)[0]]
        rows = [
            (("video",), [], [_clip(5, 7)]),
            (("image",), [pictures[3]], []),
            (("image", "image", "image"), pictures[:3], []),
            ((), [], []),
            (("video", "image"), [pictures[0]], [_clip(3, 8)]),
        ]
        texts = [_prompt(processor, ASK[number % 2], *kinds) for number, (kinds, _, _) in enumerate(rows)]
        images, videos = [row[1] for row in rows], [clip for row in rows for clip in row[2]]
        inputs = dict(processor(text=texts, images=images, videos=videos, padding_side=side))
        together = model(**inputs).logits
        for number, (_, shown, clips) in enumerate(rows):
            alone = dict(
                processor(text=texts[number : number + 1], images=[shown] if shown else None, videos=clips or None)
            )
            expected = model(**alone).logits[0]
            real = inputs["attention_mask"][number].bool()
            torch.testing.assert_close(together[number][real], expected, rtol=0, atol=2e-5)

    def test_tiles_of_an_image(self, clip_model: Any) -> None:
        """Base view, then the mosaic cut to the aspect ratio with a newline behind each row."""
        model, processor = clip_model
        wide = _clip(1, 3, 40, 80)[0]
        inputs = dict(processor(text=[_prompt(processor, ASK[0], "image")], images=[wide]))
        assert tuple(inputs["pixel_values"].shape[:2]) == (1, 3)
        found = model.model.get_image_features(
            *(inputs[name] for name in ("pixel_values", "image_sizes", "question_ids", "question_mask"))
        )
        (tokens,) = found.pooler_output
        # Two tiles side by side: 4 rows of 8 columns and a newline each, behind the 16 tokens of the base view.
        assert tokens.shape[0] == 16 + 4 * (8 + 1)
        newline = (tokens == model.model.image_newline).all(-1).nonzero().flatten().tolist()
        assert newline == [16 + 9 * row + 8 for row in range(4)]
        assert tuple(found.cosines[0].shape) == (1, 3, GRID, GRID)

    def test_wrong_placeholders(self, clip_model: Any) -> None:
        model, processor = clip_model
        inputs = _inputs(processor)
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :2]
        with pytest.raises(HostError, match="32 video placeholders, but there are 16"):
            model(**inputs)
        inputs["batch_num_videos"] = torch.tensor([2])
        with pytest.raises(HostError, match="show 2 videos, but 1 are given"):
            model(**inputs)


class TestGeneration:
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
    def test_generate_equals_rows(self, clip_model: Any, options: Any) -> None:
        model, processor = clip_model
        clips = [_clip(5, 1), _clip(3, 2)]
        inputs = _inputs(processor, ASK, clips)
        assert inputs["video_frames"].tolist() == [5, 3]
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
        together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        copies = settings.get("num_return_sequences", 1)
        for row in range(2):
            alone = _inputs(processor, ASK[row : row + 1], clips[row : row + 1])
            expected = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(together[row * copies : (row + 1) * copies], expected)

    def test_cache_equals_no_cache(self, clip_model: Any) -> None:
        model, processor = clip_model
        inputs = _inputs(processor, ASK, [_clip(5, 1), _clip(4, 2)])
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **settings), model.generate(**inputs, **settings, use_cache=False))

    def test_samples_see_their_own_images(self, clip_model: Any) -> None:
        """Two prompts with two images each, three samples of each prompt."""
        model, processor = clip_model
        pictures = [_clip(1, seed)[0] for seed in range(4)]
        texts = [_prompt(processor, question, "image", "image") for question in ASK]
        inputs = dict(processor(text=texts, images=[pictures[:2], pictures[2:]], padding_side="left"))
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 3, "num_return_sequences": 3}
        together = model.generate(**inputs, **settings, do_sample=False)[:, -3:]
        for row in range(2):
            alone = dict(processor(text=texts[row : row + 1], images=[pictures[2 * row : 2 * row + 2]]))
            expected = model.generate(**alone, **settings, do_sample=False)[:, -3:]
            assert torch.equal(together[3 * row : 3 * row + 3], expected)


class TestSaving:
    @pytest.mark.parametrize(
        ("kind", "fields"), [("clip", {}), ("clip", {"bt_adapter_depth": 2}), ("siglip", {})], ids=str
    )
    def test_round_trip(self, kind: str, fields: Any, tmp_path: Path) -> None:
        model, processor = build(kind, **fields)
        for parameter in model.parameters():
            parameter.add_(0.01)
        inputs = _inputs(processor, ASK)
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.bin"))
        register()
        register()
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        again = AutoProcessor.from_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is PPLlavaConfig
        assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        new = _inputs(again, ASK)
        assert all(torch.equal(new[name], inputs[name]) for name in inputs)
        assert torch.equal(loaded(**new).logits, expected)

    def test_tied_head(self, tmp_path: Path) -> None:
        model, processor = build(tie_word_embeddings=True)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = PPLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        inputs = _inputs(processor)
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-6)

    def test_half_precision(self, tmp_path: Path) -> None:
        model, processor = build()
        model.save_pretrained(tmp_path)
        loaded = PPLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        inputs = _inputs(processor)
        logits = loaded(**inputs).logits
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), model(**inputs).logits, rtol=0.1, atol=0.02)


class TestTemporalBranch:
    def test_zero_branch_still_mixes_and_frames_meet(self) -> None:
        """Frames of a clip influence each other through the branch alone; views of an image do not."""
        plain, processor = build()
        model, _ = build(bt_adapter_depth=2)
        for layer in model.model.vision_tower.vision_model.btadapter_T_layers:
            nn.init.normal_(layer.temporal_fc.weight, std=0.5)
        inputs = _inputs(processor)
        pixels = inputs["pixel_values_videos"].clone()
        names = ("question_ids", "question_mask")
        changed = pixels.clone()
        changed[:, 2:] += 1

        def first(model: Any, pixels: Tensor) -> Tensor:
            return model.model.encode(list(pixels), True)[0].features[:2]

        assert torch.equal(first(plain, pixels), first(plain, changed))
        assert not torch.allclose(first(model, pixels), first(model, changed), atol=1e-4)
        image = torch.stack([pixels[0, :3]])
        altered = image.clone()
        altered[:, 2:] += 1
        sizes = torch.tensor([[40, 80]])
        views = [model.model.encode(list(part), False)[0].features[:2] for part in (image, altered)]
        assert torch.equal(*views)
        found = model.model.get_image_features(image, sizes, *(inputs[name] for name in names))
        assert found.pooler_output[0].shape[0] == 16 + 4 * 9


class TestTraining:
    @torch.enable_grad()
    def test_gradients_reach_every_trainable_part(self, tmp_path: Path) -> None:
        """Also behind a checkpoint, which does not remember what is frozen."""
        model, processor = build(bt_adapter_depth=2)
        model.save_pretrained(tmp_path)
        model = PPLlavaForConditionalGeneration.from_pretrained(tmp_path)
        # Released weights are flat inside a window; a peaked map lets gradients through to the text side.
        model.config.pooling_temperature = 1e-4
        # Beyond 20 tokens, so that the trainable position table is read.
        inputs = _inputs(processor, [" ".join(ASK) + " " + " ".join(ASK)])
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.video_token_id, -100)
        model.train()
        model(**inputs, labels=labels).loss.backward()
        without = {name for name, value in model.named_parameters() if value.grad is None}
        # The last layer of tower and branch, and what pools them, lie behind the layer that is projected.
        assert all(
            any(
                part in name
                for part in (
                    "tower.vision_model.encoder.layers.2",
                    "S_layers.1",
                    "T_layers.1",
                    "post_layernorm",
                    "image_newline",
                    "logit_scale",
                    "position_embedding",
                )
            )
            for name in without
        )
        trained = {
            name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().max() > 0
        }
        for part in ("clip_visual_projection", "clip_text_projection", "clip_visual_ln", "linear_1", "lm_head", "res"):
            assert any(part in name for name in trained), part
        assert not any("logit_scale" in name or name.endswith("position_embedding") for name in trained)

    @torch.enable_grad()
    def test_text_alone_reaches_the_same_parameters(self) -> None:
        """Devices that share gradients must not wait for parameters that one batch does not use."""
        model, processor = build()
        touched, losses = [], []
        for kinds in ((), ("image",), ("video",)):
            clip = [_clip()] if "video" in kinds else None
            pictures = [_clip()[0]] if "image" in kinds else None
            inputs = processor(text=_prompt(processor, ASK[0], *kinds), images=pictures, videos=clip)
            model.zero_grad()
            model.train()
            loss = model(**inputs, labels=inputs["input_ids"].clamp_max(700)).loss
            loss.backward()
            touched.append({name for name, value in model.named_parameters() if value.grad is not None})
            losses.append((loss.item(), model.eval()(**inputs, labels=inputs["input_ids"].clamp_max(700)).loss.item()))
        assert touched[0] == touched[1] == touched[2]
        for training, plain in losses:
            assert training == pytest.approx(plain, abs=1e-6)

    def test_labels_leave_out_what_is_masked(self, clip_model: Any) -> None:
        model, processor = clip_model
        inputs = _inputs(processor)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[0, -3:] = inputs["input_ids"][0, -3:]
        output = model(**inputs, labels=labels)
        expected = nn.functional.cross_entropy(output.logits[0, -4:-1], labels[0, -3:])
        torch.testing.assert_close(output.loss, expected)

    @torch.enable_grad()
    def test_checkpointing_keeps_gradients(self) -> None:
        grads = []
        for checkpointing in (False, True):
            model, processor = build()
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()
                assert model.is_gradient_checkpointing
            inputs = _inputs(processor)
            model(**inputs, labels=inputs["input_ids"].clamp_max(700)).loss.backward()
            grads.append(model.model.multi_modal_projector.linear_1.weight.grad)
        torch.testing.assert_close(grads[0], grads[1])


def test_published_size_without_weights() -> None:
    """Vicuna 7B, CLIP L/14 and the temporal branch, built on no device: 7.3 billion parameters in their places."""
    with torch.device("meta"):
        model = PPLlavaForConditionalGeneration(PPLlavaConfig(bt_adapter_depth=4))
    assert 7.0e9 < sum(value.numel() for value in model.parameters()) < 7.6e9
    assert tuple(model.model.prompt_alignment.clip_text_model.embeddings.weight.shape) == (248, 768)
    assert tuple(model.model.prompt_alignment.clip_visual_projection.weight.shape) == (768, 1024)


def test_configuration_errors() -> None:
    with pytest.raises(HostError, match="'bert'"):
        PPLlavaConfig(prompt_config={"model_type": "bert"})
    with pytest.raises(HostError, match="three positive numbers"):
        PPLlavaConfig(video_kernel=(2, 3))


def test_defaults_are_those_of_the_published_model() -> None:
    config = PPLlavaConfig()
    assert (config.side, config.question_length, config.pair) == (24, 248, "clip")
    assert config.image_grid_pinpoints == [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert list(itertools.chain(config.video_kernel, config.image_kernel)) == [2, 3, 3, 1, 3, 3]
    assert pair().text_model.config.max_position_embeddings == 77
    assert question_tokenizer().pad_token == "<end>"
