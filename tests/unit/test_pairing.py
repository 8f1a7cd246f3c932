"""Finding the text tower of a vision tower, comparing patches with texts, and reading questions out of prompts."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tokensieve import pairing
from tokensieve.errors import HostError, SignalError
from tokensieve.hosts import tiny
from tokensieve.pairing import geometry

QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: tiny.build_in_memory(family)[0] for family in ("llava", "llava_onevision", "internvl")}


@pytest.fixture(scope="module")
def pairs(models: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {family: tiny.pair_of(models[family]) for family in ("llava", "llava_onevision")}


def _tower(model: Any) -> Any:
    return model.base_model.vision_tower


# -- pairs by geometry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sizes", "layers", "name"),
    [
        ("clip", (1024, 4096, 16, 336, 14), 24, "openai/clip-vit-large-patch14-336"),
        ("clip", (1024, 4096, 16, 336, 14), 23, "openai/clip-vit-large-patch14-336"),
        ("siglip", (1152, 4304, 16, 384, 14), 26, "google/siglip-so400m-patch14-384"),
        ("siglip", (1152, 4304, 16, 384, 14), 40, None),
        ("clip", (1024, 4096, 16, 448, 14), 24, None),
        ("internvl", (1024, 4096, 16, 336, 14), 24, None),
    ],
)
def test_published_pairs(kind: str, sizes: tuple[int, ...], layers: int, name: str | None) -> None:
    class Config:
        model_type = f"{kind}_vision_model"
        hidden_size, intermediate_size, num_attention_heads, image_size, patch_size = sizes
        num_hidden_layers = layers

    found = pairing.find_source(Config())
    assert (found and found.location) == name


def test_bundled_pair_counts_where_it_is_installed(
    models: dict[str, Any], pairs: dict[str, tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = models["llava"].config.vision_config
    assert pairing.find_source(config) is None
    for part in pairs["llava"]:
        part.save_pretrained(tmp_path / "world" / "weights" / "clip-pair")
    monkeypatch.setattr(geometry, "files", lambda package: tmp_path)
    geometry._bundled.cache_clear()
    try:
        found = pairing.find_source(config)
        assert found is not None
        assert found.location == str(tmp_path / "world" / "weights" / "clip-pair")
        pair = pairing.resolve_pair(_tower(models["llava"]))
        assert torch.isfinite(pair.embed_question(QUESTION)).all()
    finally:
        monkeypatch.undo()
        geometry._bundled.cache_clear()


def test_tower_without_known_pair_says_so(models: dict[str, Any]) -> None:
    with pytest.raises(SignalError, match="No text tower is known for this clip tower of width 32"):
        pairing.resolve_pair(_tower(models["llava"]))
    with pytest.raises(SignalError, match="No text tower is known for a internvl_vision"):
        pairing.resolve_pair(_tower(models["internvl"]))


def test_registered_pair_is_found(models: dict[str, Any], pairs: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    model, tokenizer = pairs["llava_onevision"]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    shape = pairing.VisionGeometry.of(model.config.vision_config)
    assert shape is not None
    pairing.register_source(pairing.PairSource(shape, str(tmp_path), 4))
    try:
        pair = pairing.resolve_pair(_tower(models["llava_onevision"]))
    finally:
        del geometry._SOURCES[shape]
    ours = pairing.load_pair(model, tokenizer)
    torch.testing.assert_close(pair.embed_question(QUESTION), ours.embed_question(QUESTION))


def test_loaded_once_per_host(models: dict[str, Any], pairs: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    """By name: once for a host, again for another; and the tower that was trained on is mentioned."""
    for part in pairs["llava"]:
        part.save_pretrained(tmp_path)
    tower = _tower(models["llava"])
    first = pairing.resolve_pair(tower, str(tmp_path))
    assert pairing.resolve_pair(tower, tmp_path) is first
    other = tiny.build_in_memory("llava")[0]
    assert pairing.resolve_pair(_tower(other), tmp_path) is not first
    kept = weakref.ref(pairing.resolve_pair(_tower(other), tmp_path))
    del other
    gc.collect()
    assert kept() is None, "it goes with its host"


def test_tuned_towers_are_mentioned(
    models: dict[str, Any], pairs: dict[str, tuple[Any, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    pair = pairing.load_pair(*pairs["llava"])
    with caplog.at_level("INFO", logger="tokensieve"):
        pairing.resolve_pair(_tower(models["llava"]), pair)
        assert not caplog.records
        pairing.resolve_pair(_tower(tiny.build_in_memory("llava", seed=1)[0]), pair)
    assert "was trained further since it left" in caplog.text


# -- agreement -----------------------------------------------------------------------------------------------


def test_agreement_tells_a_tuned_tower(models: dict[str, Any], pairs: dict[str, tuple[Any, Any]]) -> None:
    pair = pairing.load_pair(*pairs["llava"])
    tower = _tower(models["llava"])
    found = pair.check(tower)
    assert found.equal == found.compared > 0
    assert not found.tuned
    half = tiny.build_in_memory("llava", dtype=torch.bfloat16)[0]
    assert not pair.check(_tower(half)).tuned, "rounding is no training"
    other = tiny.build_in_memory("llava", seed=1)[0]
    assert pair.check(_tower(other)).tuned
    fewer = tiny.build_in_memory("llava", vision={"num_hidden_layers": 3})[0]
    assert pair.check(_tower(fewer)).shared < found.shared


@pytest.mark.parametrize("change", [{"intermediate_size": 48}, {"num_hidden_layers": 5}])
def test_another_tower_is_refused(pairs: dict[str, tuple[Any, Any]], change: dict[str, int]) -> None:
    other = tiny.build_in_memory("llava", vision=change)[0]
    with pytest.raises(SignalError, match=r"belongs to another vision tower: encoder\.layers"):
        pairing.resolve_pair(_tower(other), pairing.load_pair(*pairs["llava"]))


# -- the shared space ----------------------------------------------------------------------------------------


def test_clip_against_the_library(pairs: dict[str, tuple[Any, Any]]) -> None:
    """Texts equal the library's; the class token takes the library's way to the shared space."""
    model, tokenizer = pairs["llava"]
    pair = pairing.load_pair(model, tokenizer)
    ids = tokenizer([QUESTION], return_tensors="pt")
    with torch.no_grad():
        expected = model.text_projection(model.text_model(**ids).pooler_output)[0]
        seen = model.vision_model(torch.randn(2, 3, 112, 112))
        pictures = model.visual_projection(seen.pooler_output)
        states = torch.randn(2, 5, 32)
    torch.testing.assert_close(pair.embed_segments(QUESTION)[0], expected)
    # Padding behind the end changes nothing under a causal mask.
    torch.testing.assert_close(pair.embed_question(QUESTION), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pair.align(seen.last_hidden_state[:, 0]), pictures)
    torch.testing.assert_close(pair.project(states), states @ model.visual_projection.weight.T)
    assert pair.width == 20
    with pytest.raises(SignalError, match="no attention-pooling head"):
        pair.summarise(states)


def test_last_state_is_that_of_the_last_padding(pairs: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = pairs["llava"]
    ids = tokenizer([QUESTION], return_tensors="pt", padding="max_length", max_length=77)
    with torch.no_grad():
        expected = model.text_projection(model.text_model(**ids).last_hidden_state[:, -1])[0]
    torch.testing.assert_close(pairing.load_pair(model, tokenizer).last_state(QUESTION), expected)


def test_siglip_against_the_library(pairs: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = pairs["llava_onevision"]
    pair = pairing.load_pair(model, tokenizer)
    ids = tokenizer([QUESTION], return_tensors="pt", padding="max_length", max_length=64)["input_ids"]
    with torch.no_grad():
        seen = model.vision_model(torch.randn(2, 3, 126, 126))
        expected = model.text_model(input_ids=ids).pooler_output[0]
        before = torch.randn(2, 81, 32)
        head = model.vision_model.head
        normed = model.vision_model.post_layernorm(before)
        pooled = head(normed)
        one = head(normed[:, 3:4])
    assert seen.pooler_output.shape == (2, 32)
    torch.testing.assert_close(pair.embed_question(QUESTION), expected)
    vector, attention = pair.summarise(before)
    torch.testing.assert_close(vector, pooled)
    torch.testing.assert_close(attention.sum(1), torch.ones(2))
    assert attention.shape == (2, 81)
    # With a single patch the probe's attention is 1, and the head differs from the value path by its output layer.
    value = torch.nn.functional.linear(
        normed[:, 3], head.attention.in_proj_weight[64:], head.attention.in_proj_bias[64:]
    )
    torch.testing.assert_close(pair.align(before)[:, 3], value + head.mlp(head.layernorm(value)))
    through = head.attention.out_proj(value)
    torch.testing.assert_close(one, through + head.mlp(head.layernorm(through)))
    with pytest.raises(SignalError, match="no visual projection"):
        pair.project(before)


def test_long_questions(pairs: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = pairs["llava"]
    pair = pairing.load_pair(model, tokenizer)
    long = " ".join([QUESTION] * 30)
    ids = tokenizer([long], return_tensors="pt", verbose=False)["input_ids"][0]
    assert ids.numel() > 154
    count = -(-ids.numel() // 77)
    rows = torch.zeros(count * 77, dtype=torch.long)
    rows[: ids.numel()] = ids
    with torch.no_grad():
        expected = model.text_projection(model.text_model(input_ids=rows.view(count, 77)).pooler_output)
    torch.testing.assert_close(pair.embed_segments(long), expected)
    assert pair.embed_question(long).shape == (20,)
    siglip = pairing.load_pair(*pairs["llava_onevision"])
    assert siglip.embed_segments(long).shape == (-(-(ids.numel() - 1) // 64), 32)
    assert siglip.embed_segments(QUESTION).shape == (1, 32)
    torch.testing.assert_close(siglip.embed_segments(QUESTION)[0], siglip.embed_question(QUESTION))


def test_autocast_changes_nothing(pairs: dict[str, tuple[Any, Any]]) -> None:
    states = torch.randn(3, 32)
    for family in pairs:
        pair = pairing.load_pair(*pairs[family])
        text, patches = pair.embed_question(QUESTION), pair.align(states)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(pair.embed_question(QUESTION), text)
            assert torch.equal(pair.align(states), patches)


def test_what_cannot_be_a_pair(models: dict[str, Any], pairs: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    with pytest.raises(HostError, match="type 'llava' is no pair"):
        pairing.load_pair(models["llava"])
    with pytest.raises(HostError, match=r"text tower .*nowhere cannot be loaded"):
        pairing.load_pair(str(tmp_path / "nowhere"))
    pairs["llava"][0].save_pretrained(tmp_path)
    alone = pairing.load_pair(tmp_path)
    assert alone.align(torch.randn(2, 32)).shape == (2, 20), "pictures need no tokenizer"
    with pytest.raises(HostError, match="tokenizer of the text tower"):
        alone.embed_question(QUESTION)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(HostError, match="with safetensors weights"):
        pairing.load_pair(tmp_path)
    with pytest.raises(HostError, match="question is empty"):
        pairing.load_pair(*pairs["llava"]).embed_question(" \n")


# -- questions -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts() -> dict[str, tuple[Any, Any]]:
    return {family: tiny.build_in_memory(family) for family in tiny.FAMILIES}


def _visual(model: Any) -> set[int]:
    return {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")} - {None}  # type: ignore[return-value]


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_question_of_every_family(prompts: dict[str, tuple[Any, Any]], family: str) -> None:
    """Rows of a padded batch, with one visual or several."""
    model, processor = prompts[family]
    expected = ("What happens in the video?", "Describe the motion of the square, please answer with one word.")
    single = tiny.example_inputs(family, processor, batch=2)
    right = tiny.example_inputs(family, processor, batch=2, padding_side="right")
    for inputs in (single, right):
        for row, words in enumerate(expected):
            found = pairing.find_question(processor, inputs["input_ids"][row], _visual(model))
            assert found.text == words
            assert processor.tokenizer.decode(found.ids).strip() == words
            assert torch.equal(inputs["input_ids"][row][found.positions], found.ids)
            assert bool((found.positions.diff() > 0).all())


def _chat(processor: Any, messages: list[dict[str, Any]], **options: Any) -> torch.Tensor:
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return processor.tokenizer([text], return_tensors="pt")["input_ids"][0]


def _turn(role: str, *parts: str) -> dict[str, Any]:
    content = [{"type": "image"} if part == "<>" else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "video_llama_3"]
)
def test_last_turn_counts(prompts: dict[str, tuple[Any, Any]], family: str) -> None:
    model, processor = prompts[family]
    first = [_turn("user", "<>", "What is the weather like?"), _turn("assistant", "It is raining.")]
    second = [_turn("user", "Where is the ball?")]
    ids = _chat(processor, first + second)
    assert pairing.find_question(processor, ids, _visual(model)).text == "Where is the ball?"
    system = [{"role": "system", "content": [{"type": "text", "text": "Answer with one word."}]}]
    ids = _chat(processor, system + first[:1])
    assert pairing.find_question(processor, ids, _visual(model)).text == "What is the weather like?"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_words_in_front_of_the_picture(prompts: dict[str, tuple[Any, Any]], family: str) -> None:
    model, processor = prompts[family]
    ids = _chat(processor, [_turn("user", "Where is the ball?", "<>")])
    assert pairing.find_question(processor, ids, _visual(model)).text == "Where is the ball?"
    ids = _chat(processor, [_turn("user", "Look at this.", "<>", "Where is the ball?")])
    assert pairing.find_question(processor, ids, _visual(model)).text == "Where is the ball?"


def test_prompt_without_words(prompts: dict[str, tuple[Any, Any]]) -> None:
    model, processor = prompts["qwen2_5_vl"]
    ids = _chat(processor, [_turn("user", "<>")])
    with pytest.raises(HostError, match="asks nothing"):
        pairing.find_question(processor, ids, _visual(model))


def test_template_is_not_needed(prompts: dict[str, tuple[Any, Any]]) -> None:
    """A hand-written prompt of a tokenizer without template: everything behind the picture."""
    model, processor = prompts["llava"]
    ids = processor.tokenizer(["A picture: <image>\nWhere is the ball?"], return_tensors="pt")["input_ids"][0]
    words = tiny.build_in_memory("llava")[1].tokenizer
    words.chat_template = None
    assert pairing.find_question(words, ids, _visual(model)).text == "Where is the ball?"


def test_vocabulary_of_words() -> None:
    """A tokenizer that splits at blanks: no token for a line break, words come back in lower case."""
    words = ["<pad>", "<unk>", "<start>", "<end>", "<video>", "user", "assistant", "where", "is", "the", "ball", "?"]
    core = Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = tokenizers.normalizers.Lowercase()
    parts = [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation()]
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        extra_special_tokens={"video_token": "<video>"},
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<start> {{ m['role'] }} {% for part in m['content'] if part['type'] == 'video' %}"
        "<video> {% endfor %}{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
        "<end> {% endfor %}{% if add_generation_prompt %}<start> assistant {% endif %}"
    )
    ids = _chat_ids(
        tokenizer, [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Where is the ball?"}]}]
    )
    found = pairing.find_question(tokenizer, ids, {4})
    assert found.text == "where is the ball ?"
    assert found.ids.tolist() == [7, 8, 9, 10, 11]


def _chat_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> torch.Tensor:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer([text], return_tensors="pt")["input_ids"][0]


def test_tokenizer_of_a_model(prompts: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    model, processor = prompts["llava"]
    assert pairing.find_tokenizer(processor, model) is processor
    with pytest.raises(HostError, match="does not say which checkpoint"):
        pairing.find_tokenizer(None, model)
    processor.save_pretrained(tmp_path)
    found = pairing.find_tokenizer(str(tmp_path), model)
    assert found.chat_template == processor.chat_template
    with pytest.raises(HostError, match="cannot be loaded to read prompts"):
        pairing.find_tokenizer(str(tmp_path / "nowhere"), model)
