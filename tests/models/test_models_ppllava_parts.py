"""Around the PPLLaVA model: its processor and templates, putting it together, and reading released checkpoints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ppllava_tiny import SIDE, TILES, build, language_model, pair, question_tokenizer
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tokensieve.errors import HostError
from tokensieve.hosts import tiny
from tokensieve.models.ppllava import assemble, assemble_processor, load_official
from tokensieve.models.ppllava.official import config_of_official, new_name
from tokensieve.models.ppllava.templates import question_of
from tokensieve.models.ppllava.views import image_tokens, mosaic_slices, tile_shape, view_count
from tokensieve.prompt import build_prompt
from tokensieve.video import read_clip


def _clip(frames: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, 40, 60, 3), dtype=np.uint8)


def _turn(text: str, role: str = "user", *kinds: str) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}


@pytest.fixture(scope="module", params=["vicuna", "chatml"])
def written(request: pytest.FixtureRequest) -> Any:
    return build(template=request.param)[1]


class TestTemplates:
    def test_single_turn(self, written: Any) -> None:
        text = written.apply_chat_template([_turn("Where?", "user", "video")], add_generation_prompt=True)
        assert text in (
            "USER: <video>\nWhere? ASSISTANT: ",
            "<|im_start|>user\n<video>\nWhere?<|im_end|>\n<|im_start|>assistant\n",
        )

    def test_question_is_the_last_user_turn(self, written: Any) -> None:
        turns = [
            {"role": "system", "content": "Answer briefly."},
            _turn("Who runs?", "user", "video"),
            _turn("The dog.", "assistant"),
            _turn("Which option?\n(A) left\n(B) right", "user"),
        ]
        for primed in ("", "Best option: ("):
            text = written.apply_chat_template(turns, add_generation_prompt=True) + primed
            assert question_of(written, text, ("<image>", "<video>")) == "Which option?\n(A) left\n(B) right"
        first = written.apply_chat_template(turns[:2], add_generation_prompt=True)
        assert question_of(written, first, ("<image>", "<video>")) == "Who runs?"

    def test_text_of_another_shape_is_taken_whole(self, written: Any) -> None:
        assert question_of(written, "<video> Count the cars.", ("<image>", "<video>")) == "Count the cars."

    def test_templates_of_other_families(self) -> None:
        for family in ("llava", "llava_next", "llava_onevision", "llava_video", "qwen2_5_vl", "internvl"):
            _, processor = tiny.load(family)
            kind = "image" if not tiny.FAMILIES[family].videos else "video"
            turns = [_turn("Who runs?", "user", kind), _turn("A dog.", "assistant"), _turn("Where to?", "user")]
            text = processor.apply_chat_template(turns, add_generation_prompt=True)
            assert question_of(processor, text, ()) == "Where to?", family


class TestProcessor:
    def test_given_questions_win(self, written: Any) -> None:
        texts = [f"<video>\n{number}" for number in range(2)]
        inputs = written(text=texts, videos=_clip(), questions=["Where is the box?", "Describe the scene."])
        read = written.question_tokenizer.batch_decode(inputs["question_ids"], skip_special_tokens=True)
        assert read == ["Where is the box ?", "Describe the scene ."]
        assert tuple(inputs["question_ids"].shape) == (2, 248)
        assert inputs["question_mask"].sum(1).tolist() == [7, 6]

    def test_long_questions_are_truncated(self, written: Any) -> None:
        inputs = written(text="<video>", videos=_clip(), questions="ball " * 400)
        assert inputs["question_mask"].sum() == 248
        end = written.question_tokenizer.eos_token_id
        assert int(inputs["question_ids"][0, -1]) == end

    def test_frames_are_stretched_to_a_square(self, written: Any) -> None:
        """Without keeping the aspect ratio: both halves of a wide frame stay visible."""
        frame = np.zeros((40, 120, 3), dtype=np.uint8)
        frame[:, :10], frame[:, -10:] = 255, 255
        pixels = written(text="<video>", videos=[frame[None]])["pixel_values_videos"][0, 0]
        assert tuple(pixels.shape) == (3, SIDE, SIDE)
        bright = pixels.mean((0, 1))
        assert bright[:3].min() > bright[SIDE // 2] and bright[-3:].min() > bright[SIDE // 2]

    def test_views_of_a_single_image_and_squares_of_several(self, written: Any) -> None:
        wide, tall = (Image.fromarray(np.zeros((h, w, 3), dtype=np.uint8)) for h, w in ((40, 90), (90, 40)))
        inputs = written(text=["<image> a", "<image><image> b"], images=[wide, tall, wide])
        assert inputs["batch_num_images"].tolist() == [1, 2]
        assert inputs["image_sizes"].tolist() == [[40, 90], [90, 40], [40, 90]]
        assert tuple(inputs["pixel_values"].shape) == (3, 3, 3, SIDE, SIDE)
        assert not inputs["pixel_values"][1:, 1:].any()
        counts = (inputs["input_ids"] == written.image_token_id).sum(1).tolist()
        assert counts == [image_tokens((40, 90), (1, 2), (4, 4)), 32]

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            ({"text": "<video>"}, "1 video placeholders for 0 videos"),
            ({"text": "a", "videos": _clip()}, "0 video placeholders for 1 videos"),
            ({"text": ["<image>", "a"], "images": [_clip()[0]] * 2}, "1 image placeholders for 2 images"),
            ({"text": ["a", "b"], "questions": ["c"]}, "1 questions for 2 prompts"),
            ({"text": "a", "audio": 1}, "without audio"),
            ({"text": "a", "colour": 1}, "no option 'colour'"),
            ({"text": "<image>", "images": [np.zeros((4, 4, 2))]}, r"shape \[4, 4, 2\]"),
        ],
    )
    def test_what_does_not_go_together(self, written: Any, call: Any, words: str) -> None:
        with pytest.raises(HostError, match=words):
            written(**call)

    def test_tokenised_templates(self, written: Any) -> None:
        turn = {"role": "user", "content": [{"type": "video", "video": _clip()}, {"type": "text", "text": "Where?"}]}
        inputs = written.apply_chat_template([turn], add_generation_prompt=True, tokenize=True, return_dict=True)
        text = written.apply_chat_template([turn], add_generation_prompt=True)
        plain = written(text=text, videos=[_clip()])
        assert torch.equal(inputs["question_ids"], plain["question_ids"])
        assert torch.equal(inputs["pixel_values_videos"], plain["pixel_values_videos"])

    def test_prompts_of_the_command_line(self, written: Any, tmp_path: Path) -> None:
        path = tmp_path / "picture.png"
        Image.fromarray(_clip()[0]).save(path)
        prompt = build_prompt(written, read_clip(path), ["Where?", "Who?"])
        assert prompt.inputs["image_index"].tolist() == [0, 0] and prompt.inputs["pixel_values"].shape[0] == 1
        assert prompt.inputs["input_ids"].shape[0] == 2


class TestViews:
    def test_published_mosaic(self) -> None:
        """Two by two tiles of 8 x 8: at most 64 + 16 rows of 16 and a newline."""
        tiles = tile_shape((672, 672), [[336, 672], [672, 672]], 336)
        assert tiles == (2, 2) and view_count((672, 672), [[336, 672], [672, 672]], 336) == 5
        assert image_tokens((672, 672), tiles, (8, 8)) == 64 + 272
        assert image_tokens((500, 700), None, (8, 8)) == 65

    def test_padding_is_cut_on_both_sides(self) -> None:
        assert mosaic_slices((50, 100), 16, 16) == (slice(4, 12), slice(0, 16))
        assert mosaic_slices((100, 50), 16, 16) == (slice(0, 16), slice(4, 12))


class TestAssembly:
    def test_uncompressed_base_model(self) -> None:
        """With windows of one patch the logits are those of the LLaVA model it started from."""
        contrast, language = pair(), language_model(802)
        config = LlavaConfig(
            vision_config=contrast.config.vision_config, text_config=language.config, image_token_index=801
        )
        torch.manual_seed(3)
        base = LlavaForConditionalGeneration(config).eval()
        base.model.vision_tower.load_state_dict(contrast.vision_model.state_dict())
        model = assemble(contrast, base=base, video_kernel=(1, 1, 1), video_token_id=800)
        pixels = torch.rand(1, 1, 3, SIDE, SIDE)
        visual = torch.full((1, 144), 801)
        ids = torch.cat([torch.tensor([[1, 5, 9]]), visual, torch.tensor([[7, 8]])], dim=1)
        with torch.no_grad():
            expected = base(input_ids=ids, pixel_values=pixels[0]).logits
            ours = model(
                input_ids=ids.masked_fill(ids == 801, 800),
                pixel_values_videos=pixels,
                question_ids=torch.ones(1, 4, dtype=torch.long),
            ).logits
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision", "llava_video"])
    def test_from_tiny_hosts(self, family: str) -> None:
        base, processor = tiny.load(family)
        kind = "siglip" if "onevision" in family or family == "llava_video" else "clip"
        contrast = pair(kind, intermediate_size=64)
        model = assemble(contrast, base=base)
        made = assemble_processor(
            model, processor.tokenizer, question_tokenizer(), chat_template=processor.chat_template
        )
        texts = [made.apply_chat_template([_turn("Where?", "user", "image")], add_generation_prompt=True)]
        inputs = made(text=texts, images=[_clip()[0]])
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
        assert torch.equal(model.model.image_newline, base.model.image_newline)
        assert model.config.image_grid_pinpoints == base.config.image_grid_pinpoints

    def test_parts_that_do_not_fit(self) -> None:
        contrast = pair()
        with pytest.raises(HostError, match="give one of them"):
            assemble(contrast)
        with pytest.raises(HostError, match="'llama' model; give a CLIPModel"):
            assemble(language_model(20), language_model(20))
        base, _ = tiny.load("llava_next")
        onevision, _ = tiny.load("llava_onevision")
        with pytest.raises(HostError, match=r"does not fill SiglipAlignment: 3 weights missing or of another shape"):
            assemble(pair("siglip"), base=onevision)
        contrast.vision_model.config.hidden_size = 48
        with pytest.raises(HostError, match="has the width 32, that of the pair 48"):
            assemble(contrast, base=base)

    def test_without_extension(self) -> None:
        model, processor = build()
        plain = assemble(pair(), language_model(802), extend=False, image_grid_pinpoints=TILES)
        assert (model.config.question_length, plain.config.question_length) == (248, 77)
        assert plain.config.keep_positions is None
        made = assemble_processor(plain, processor.tokenizer, question_tokenizer())
        assert tuple(made(text="<video>", videos=_clip())["question_ids"].shape) == (1, 77)
        short = torch.randint(3, 50, (1, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, theirs = (
                m.model.prompt_alignment.embed_text(torch.cat([short[:, :19], short[:, :1] * 0 + 99999 % 50], 1))
                for m in (model, plain)
            )
        torch.testing.assert_close(ours, theirs)


def _official(model: Any) -> dict[str, torch.Tensor]:
    """State dict of a model under the names of the released code."""
    found = {}
    adapter = bool(model.config.bt_adapter_depth)
    for name, value in model.state_dict().items():
        if name.startswith("lm_head."):
            name = "language_model." + name
        name = name.removeprefix("model.")
        if name.startswith("language_model.") and ".lm_head" not in name:
            name = name.replace("language_model.", "language_model.model.", 1)
        if name.startswith("vision_tower.") and not adapter:
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        found[name.replace("prompt_alignment.", "multi_modal_projector.")] = value.clone()
    return found


class TestReleasedCheckpoints:
    @pytest.mark.parametrize(
        ("kind", "fields"), [("clip", {}), ("clip", {"bt_adapter_depth": 2}), ("siglip", {})], ids=str
    )
    def test_synthetic_checkpoint(self, kind: str, fields: Any, tmp_path: Path) -> None:
        """A folder as released: LLaVA's config.json, weights under the old names and an old buffer."""
        model, processor = build(kind, **fields)
        weights = _official(model)
        for name in (
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "language_model.lm_head.weight",
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            "multi_modal_projector.linear_1.weight",
            "multi_modal_projector.clip_text_model.embeddings.position_embedding_res",
            "multi_modal_projector.logit_scale",
            "image_newline",
        ):
            assert name in weights
        weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(145)[None]
        save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "model.safetensors")
        text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
        stated = {"text_config": text, "vision_config": vision, "image_token_index": model.config.image_token_id}
        stated |= {"video_token_index": model.config.video_token_id, "image_grid_pinpoints": TILES}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        if kind == "siglip":
            # Four heads of 8: not what the widths of released towers tell.
            config = config_of_official(weights, text, vision, prompt_config=model.config.prompt_config)
            config.image_token_id, config.video_token_id = model.config.image_token_id, model.config.video_token_id
            config.vision_feature_layer = model.config.vision_feature_layer
        else:
            config = config_of_official(weights, text, vision, image_token_id=801, video_token_id=802)
            assert config.prompt_config.num_hidden_layers == 2 and config.projection_dim == 24
            assert (config.bt_adapter_depth, config.keep_positions) == (fields.get("bt_adapter_depth", 0), 20)
            config.prompt_config = model.config.prompt_config
            config.image_token_id, config.video_token_id = model.config.image_token_id, model.config.video_token_id
        config.image_grid_pinpoints = TILES
        loaded, report = load_official(tmp_path, config)
        assert report.complete and report.loaded == len(model.state_dict())
        inputs = processor(text="<video>\nWhere?", videos=_clip())
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        own, again = load_official(tmp_path)
        assert again.complete and own.config.video_token_id == model.config.video_token_id

    def test_faults_are_named(self) -> None:
        model, _ = build()
        weights = _official(model)
        del weights["multi_modal_projector.clip_visual_ln.bias"]
        weights["multi_modal_projector.extra.weight"] = torch.zeros(3)
        weights["image_newline"] = torch.zeros(7)
        with pytest.raises(HostError, match=r"1 missing: model\.prompt_alignment\.clip_visual_ln\.bias; 1 unexpected"):
            load_official(weights, model.config)
        _, report = load_official(weights, model.config, strict=False)
        assert report.missing == ["model.prompt_alignment.clip_visual_ln.bias"]
        assert report.unexpected == ["multi_modal_projector.extra.weight"]
        assert report.mismatched == ["image_newline [7] for [32]"]
        assert "1 mismatched: image_newline [7] for [32]" in str(report)

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match="does not exist"):
            load_official(tmp_path / "absent")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(HostError, match="only pickled weights"):
            load_official(tmp_path)
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(HostError, match=r"no usable config\.json"):
            load_official(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(HostError, match="does not describe a LLaVA model"):
            load_official(tmp_path)
        with pytest.raises(HostError, match="is it PPLLaVA"):
            config_of_official({}, {}, {})
        with pytest.raises(HostError, match="give config as well"):
            load_official({})

    def test_names(self) -> None:
        assert new_name("vision_tower.vision_model.pre_layrnorm.bias", False) == "model.vision_tower.pre_layrnorm.bias"
        name = "vision_tower.vision_model.btadapter_cls_token"
        assert new_name(name, True) == "model." + name
        assert new_name("something.else", False) == "something.else"


def test_operator_benchmark_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    threads = torch.get_num_threads()
    benchmark = importlib.import_module("benchmarks.ppllava_operator")
    sizes = {"frames": 4, "side": 6, "width": 128, "intermediate": 64, "depth": 4, "layers": 2, "vision-width": 16}
    sizes |= {"text-width": 64, "text-layers": 1, "prompt": 3}
    try:
        words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        assert benchmark.main(["--quick", *words, "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "ppllava_operator.json").read_text())
    assert found["tokens"] == {"all": 144, "pooled": 8}
    assert set(found["seconds"]) == set(found["peak_bytes"]) and len(found["seconds"]) == 6
    assert "times are 2 times theirs" in (tmp_path / "ppllava_operator.md").read_text()
