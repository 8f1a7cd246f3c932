"""The tiny checkpoints behave like the families they stand for, on untouched transformers."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel

from tokensieve.errors import HostError
from tokensieve.hosts import tiny

FAMILIES = sorted(tiny.FAMILIES)
WITH_VIDEO = [slug for slug in FAMILIES if tiny.FAMILIES[slug].videos]

# Visual placeholders that one picture, two pictures and a clip of four frames take, all of 112 x 168 pixels.
IMAGE_TOKENS = {
    "llava": (64, 128),
    "llava_next": (
        64 + 8 * (12 + 1),
        2 * 168,
    ),  # base view, then rows of the unpadded tiles with their newlines
    "llava_next_video": (64 + 8 * (12 + 1), 2 * 168),
    "llava_onevision": (81 + 9 * (14 + 1), 2 * (81 + 1)),  # several images are not cut into tiles
    "llava_video": (81 + 9 * (14 + 1), 2 * (81 + 1)),
    "qwen2_vl": (4 * 6, 2 * 24),
    "qwen2_5_vl": (4 * 6, 2 * 24),
    "qwen3_vl": (4 * 5, 2 * 20),
    "internvl": (3 * 16, 2 * 48),  # two tiles and a thumbnail
    "video_llama_3": (4 * 7, 2 * 28),  # images are not merged
}
CLIP_TOKENS = {
    "llava_onevision": 4 * 5 * 5 + 1,
    "llava_next_video": 4 * 4 * 4,
    "llava_video": 4 * 4 * (4 + 1),
    "qwen2_vl": 2 * 4 * 6,
    "qwen2_5_vl": 2 * 4 * 6,
    "qwen3_vl": 2 * 4 * 5,
    "internvl": 4 * 4 * 4,
}


def placeholders(model: PreTrainedModel, inputs: BatchFeature) -> list[int]:
    """Visual placeholders of every row."""
    ids = [getattr(model.config, name, -1) for name in ("image_token_id", "video_token_id")]
    return torch.isin(inputs["input_ids"], torch.tensor(ids)).sum(dim=1).tolist()


def answer(model: PreTrainedModel, inputs: BatchFeature, length: int = 4) -> torch.Tensor:
    """Greedy continuation, `[rows, length]`."""
    output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: BatchFeature) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_load_the_folder(family: str, tiny_host) -> None:
    model, processor = tiny_host(family)
    folder = tiny.cached(family)
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == family
    assert model.config.architectures == [type(model).__name__]
    assert config.text_config.vocab_size == len(processor.tokenizer)
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == config.image_token_id
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert sum(files.values()) < 20e6


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_words_and_depend_on_what_is_seen(family: str, tiny_host) -> None:
    model, processor = tiny_host(family)
    answers = [answer(model, tiny.example_inputs(family, processor, seed=seed), length=8)[0] for seed in (0, 1)]
    for tokens in answers:
        assert len(tokens) == 8
        assert not set(tokens.tolist()) & set(processor.tokenizer.all_special_ids)
        assert processor.decode(tokens).isascii()
        assert len(set(tokens.tolist())) > 2, "the answer repeats itself"
    assert not torch.equal(*answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_placeholders_follow_the_geometry(family: str, tiny_host) -> None:
    model, processor = tiny_host(family)
    one, two = (tiny.example_inputs(family, processor, videos=0, images=count) for count in (1, 2))
    assert placeholders(model, one) == [IMAGE_TOKENS[family][0]]
    assert placeholders(model, two) == [IMAGE_TOKENS[family][1]]
    assert logits(model, one).isfinite().all()
    assert answer(model, two).shape == (1, 4)


@pytest.mark.parametrize("family", sorted(CLIP_TOKENS))
def test_video_placeholders_follow_the_geometry(family: str, tiny_host) -> None:
    model, processor = tiny_host(family)
    one, two = (tiny.example_inputs(family, processor, videos=count) for count in (1, 2))
    assert placeholders(model, one) == [CLIP_TOKENS[family]]
    assert placeholders(model, two) == [2 * CLIP_TOKENS[family]]
    mixed = tiny.example_inputs(family, processor, images=1)
    assert placeholders(model, mixed) == [CLIP_TOKENS[family] + IMAGE_TOKENS[family][0]]
    for inputs in (two, mixed):
        assert answer(model, inputs).shape == (1, 4)


def test_video_llama_3_drops_unchanged_patches(tiny_host) -> None:
    model, processor = tiny_host("video_llama_3")
    inputs = tiny.example_inputs("video_llama_3", processor, videos=2, images=1)
    kept = inputs["video_compression_mask"]
    assert kept.numel() == 2 * 4 * 24
    assert 0 < kept.sum() < kept.numel()
    assert placeholders(model, inputs) == [int(kept.sum()) + IMAGE_TOKENS["video_llama_3"][0]]
    assert answer(model, inputs).shape == (1, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_itself_refuses_a_lost_placeholder(family: str, tiny_host) -> None:
    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor)
    ids = inputs["input_ids"][0]
    visual = {model.config.image_token_id, getattr(model.config, "video_token_id", None)}
    first = next(position for position, token in enumerate(ids.tolist()) if token in visual)
    ids[first] = processor.tokenizer.convert_tokens_to_ids("a")
    with pytest.raises((ValueError, RuntimeError), match="match"):
        logits(model, inputs)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_its_rows_alone(family: str, padding_side: str, tiny_host) -> None:
    model, processor = tiny_host(family)
    shape = {"videos": 2, "images": 0} if padding_side == "left" else {"videos": 1, "images": 1}
    batch = tiny.example_inputs(family, processor, batch=3, padding_side=padding_side, **shape)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) == 3, "the rows should be uneven"
    together = logits(model, batch)
    for row in range(3):
        alone = logits(model, tiny.example_inputs(family, processor, batch=3, row=row, **shape))
        assert alone.shape[1] == lengths[row]
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row, real], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_generation_equals_rows_alone(family: str, tiny_host) -> None:
    model, processor = tiny_host(family)
    together = answer(model, tiny.example_inputs(family, processor, batch=2))
    for row in range(2):
        alone = answer(model, tiny.example_inputs(family, processor, batch=2, row=row))
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_template_takes_arrays_and_pictures(family: str, tiny_host) -> None:
    model, processor = tiny_host(family)
    messages = tiny.example_messages(family, images=1)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert placeholders(model, inputs) == placeholders(model, tiny.example_inputs(family, processor, images=1))
    assert answer(model, inputs, length=2).shape == (1, 2)
    history = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}, *messages]
    text = processor.apply_chat_template(history, add_generation_prompt=True)
    assert "Yes." in text and text.count(processor.image_token) == (2 if tiny.FAMILIES[family].videos else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_peaked_and_tokens_differ(family: str) -> None:
    model, processor = tiny.load(family, attn_implementation="eager")
    inputs = tiny.example_inputs(family, processor)
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    length = inputs["input_ids"].shape[1]
    for attention in output.attentions:
        last = attention[0, :, -1].double().clamp_min(1e-12)
        share = float(-(last * last.log()).sum(-1).mean()) / math.log(length)
        assert 0.2 < share < 0.9, "entropy of the last query, as a share of the uniform one"
    visual = torch.isin(
        inputs["input_ids"][0],
        torch.tensor([getattr(model.config, name, -1) for name in ("image_token_id", "video_token_id")]),
    )
    features = torch.nn.functional.normalize(output.hidden_states[0][0, visual], dim=-1)
    similarity = (features @ features.T).fill_diagonal_(0).sum() / (len(features) * (len(features) - 1))
    assert similarity < 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_finite(family: str, dtype: str) -> None:
    model, processor = tiny.build_in_memory(family, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    assert logits(model, tiny.example_inputs(family, processor)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_again_it_is_the_same(family: str, tiny_host, tmp_path: Path) -> None:
    model, processor = tiny_host(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    inputs = tiny.example_inputs(family, processor, images=1)
    inputs_again = tiny.example_inputs(family, processor_again, images=1)
    assert inputs.keys() == inputs_again.keys()
    for name, value in inputs.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(inputs_again[name])), name
    assert torch.equal(logits(model, inputs), logits(again.eval(), inputs_again))


def test_memory_and_folder_hold_the_same_weights(tiny_host, tmp_path: Path) -> None:
    model, _ = tiny_host("qwen3_vl")
    same, _ = tiny.build_in_memory("qwen3_vl")
    other, _ = tiny.build_in_memory("qwen3_vl", seed=1)
    state, other_state = same.state_dict(), other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(torch.equal(value, other_state[name]) for name, value in state.items() if value.dim() > 1)


def test_building_leaves_random_numbers_and_initialisation_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.build_in_memory("llava_video")
    assert torch.equal(torch.rand(3), expected)
    assert torch.nn.Linear(50, 50).weight.abs().max() <= 50**-0.5
    assert PreTrainedModel.init_weights.__name__ == "init_weights"


def test_tied_embeddings_can_be_asked_for() -> None:
    model, processor = tiny.build_in_memory("internvl", config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert logits(model, tiny.example_inputs("internvl", processor)).isfinite().all()


def test_build_is_idempotent_and_replaces_only_its_own(tmp_path: Path) -> None:
    folder = tiny.build("llava", tmp_path / "checkpoint")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny.build("llava", folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    tiny.build("qwen2_vl", folder)
    assert AutoConfig.from_pretrained(folder).model_type == "qwen2_vl"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(HostError, match="holds other files"):
        tiny.build("llava", foreign)
    assert (foreign / "notes.txt").read_text() == "mine"


def test_cache_survives_simultaneous_builders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: tiny.cached("llava", tmp_path), range(4)))
    assert len(set(folders)) == 1
    assert list(tmp_path.iterdir()) == [folders[0]]
    assert AutoModelForImageTextToText.from_pretrained(folders[0]).config.model_type == "llava"


def test_cache_honours_the_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tiny.cached("llava")
    assert folder.parent == tmp_path / "tokensieve" / "tiny"
    assert tiny.cached("llava", seed=1) != folder


def test_overrides_reach_model_and_processor() -> None:
    text = {"hidden_size": 96, "num_hidden_layers": 7, "num_attention_heads": 6, "vocab_size": 1000}
    model, processor = tiny.build_in_memory("llava_onevision", text=text, vision={"image_size": 384, "hidden_size": 48})
    assert len(model.model.language_model.layers) == 7
    assert model.lm_head.weight.shape == (1000, 96)
    inputs = tiny.example_inputs("llava_onevision", processor, frames=2)
    assert placeholders(model, inputs) == [2 * 14 * 14 + 1]
    assert answer(model, inputs, length=2).max() < len(processor.tokenizer)
    wide, processor = tiny.build_in_memory("qwen2_5_vl", text={"hidden_size": 128, "num_attention_heads": 2})
    assert wide.config.text_config.rope_parameters["mrope_section"] == [8, 12, 12]
    assert logits(wide, tiny.example_inputs("qwen2_5_vl", processor)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "gpt"}, "no tiny checkpoint of 'gpt'"),
        ({"family": "llava", "tower": {}}, "Unknown override 'tower'"),
        ({"family": "llava", "dtype": "int3"}, "is no floating-point type"),
        ({"family": "llava", "text": {"vocab_size": 10}}, "vocab_size 10"),
    ],
)
def test_wrong_requests_are_explained(arguments: dict, message: str) -> None:
    with pytest.raises(HostError, match=message):
        tiny.build_in_memory(**arguments)


def test_synthetic_clips_move_over_a_still_ground() -> None:
    clip = tiny.synthetic_clip(6, seed=3)
    assert clip.shape == (6, 112, 168, 3) and clip.dtype == np.uint8
    still = (clip == clip[:1]).all(axis=(0, 3))
    assert 0.2 < still.mean() < 0.95
    assert all((clip[index] != clip[index + 1]).any() for index in range(5))
    assert np.array_equal(clip[:3], tiny.synthetic_clip(3, seed=3))
    assert not np.array_equal(clip, tiny.synthetic_clip(6, seed=4))
    with pytest.raises(HostError, match="at least one frame"):
        tiny.synthetic_clip(0)


def test_llava_video_rows_are_pooled_and_end_in_a_newline(tiny_host) -> None:
    model, processor = tiny_host("llava_video")
    inputs = tiny.example_inputs("llava_video", processor)
    projected = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *call: projected.append(call[2]))
    try:
        with torch.no_grad():
            features = model.model(**inputs).video_hidden_states
    finally:
        hook.remove()
    rows = features.view(4, 4, 5, -1)
    newline = model.model.image_newline
    assert torch.equal(rows[:, :, -1], newline.expand_as(rows[:, :, -1]))
    # The ninth row and column of the patch grid fall away; each pooled token is the mean of a 2 x 2 window.
    window = projected[0].view(4, 9, 9, -1)[:, :8, :8].unflatten(2, (4, 2)).unflatten(1, (4, 2)).mean(dim=(2, 4))
    torch.testing.assert_close(rows[:, :, :-1], window, atol=1e-5, rtol=1e-5)


def test_llava_video_counts_tokens_from_sizes_alone(tiny_host) -> None:
    from tokensieve.models import llava_video

    _, processor = tiny_host("llava_video")
    assert llava_video.tokens_per_frame(27) == 182
    counts = processor._get_num_multimodal_tokens(image_sizes=[(112, 168)], video_sizes=[(4, 112, 168), (1, 50, 50)])
    assert counts.num_video_tokens == [80, 20]
    assert counts.num_image_tokens == [IMAGE_TOKENS["llava_video"][0]]


def test_llava_video_features_as_tuple_equal_the_named_ones(tiny_host) -> None:
    model, processor = tiny_host("llava_video")
    pixels = tiny.example_inputs("llava_video", processor)["pixel_values_videos"]
    with torch.no_grad():
        named = model.get_video_features(pixels, return_dict=True)
        plain = model.get_video_features(pixels, return_dict=False)
    assert isinstance(plain, tuple)
    assert any(torch.equal(named.pooler_output, entry) for entry in plain if isinstance(entry, torch.Tensor))
