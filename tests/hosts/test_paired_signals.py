"""Signals of text towers and of words in a prompt, against what the models themselves compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tokensieve
from tokensieve.core.encode import EncodeCall
from tokensieve.core.guided import GuidedMethod
from tokensieve.core.method import Stage
from tokensieve.core.plan import Plan
from tokensieve.core.sample import TokenSample
from tokensieve.errors import HostError, MethodError, SignalError
from tokensieve.hosts import host_for, tiny
from tokensieve.load import meta_model
from tokensieve.pairing import PairSource, TextPair, load_pair

CLIP = ["llava", "llava_next", "llava_next_video"]
SIGLIP = ["llava_onevision", "llava_video"]
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
WORDS = ("prompt.question_embedding", "prompt.question_segments", "prompt.question_words", "prompt.newline")


@dataclass
class Listener(GuidedMethod):
    """Keeps everything and remembers the samples it was given."""

    retention: float = 0.99
    wanted: tuple[str, ...] = ()
    seen: list[TokenSample] = field(default_factory=list)

    name: ClassVar[str] = "listener"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)

    def signals(self, facts: Any) -> tuple[str, ...]:
        return self.wanted

    def plan_tokens(self, sample: TokenSample) -> Plan:
        self.seen.append(sample)
        return Plan(torch.arange(sample.layout.patches))


@pytest.fixture(scope="module")
def pairs(tiny_host: Any) -> dict[str, TextPair]:
    return {family: load_pair(*tiny.pair_of(tiny_host(family)[0])) for family in CLIP + SIGLIP}


def _listen(model: Any, inputs: Any, *wanted: str, **options: Any) -> list[TokenSample]:
    listener = Listener(wanted=wanted, **options)
    with torch.no_grad(), tokensieve.compress(model, listener):
        model(**inputs)
    return listener.seen


def _hidden(model: Any, inputs: Any) -> tuple[Tensor, ...]:
    """Hidden states of the tower for all pictures of the prompt, in front of its final norm."""
    base, seen = model.base_model, []
    layers = base.vision_tower.get_submodule("encoder.layers")
    handles = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return tuple(seen)


@pytest.mark.parametrize("family", CLIP + SIGLIP)
def test_projected_states_are_the_features(tiny_host: Any, family: str) -> None:
    """States of the feature layer through the projector give the tokens that enter the LLM.

    Where pooling follows the projector this holds up to its non-linearity, so that is left out.
    """
    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor)
    (sample,) = _listen(model, inputs, "encoder.states@feature")
    found = sample.signal("encoder.states@feature")
    assert found.shape == (sample.layout.patches, 32)
    assert sample.project is not None
    if family in CLIP:
        torch.testing.assert_close(sample.project(found), sample.features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava_next_video", "llava_onevision"])
def test_aligned_patches(tiny_host: Any, pairs: dict[str, TextPair], family: str) -> None:
    """Layer, norm and projection are those of the pair, and pooling is that of the features."""
    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor)
    (sample,) = _listen(model, inputs, "encoder.aligned@feature", text_tower=pairs[family])
    found = sample.signal("encoder.aligned@feature")
    states = _hidden(model, inputs)[host_for(model).facts(model.base_model).feature_layer]
    aligned = pairs[family].align(states[:, 1:] if family in CLIP else states)
    side = int(aligned.shape[1] ** 0.5)
    if family == "llava_next_video":
        grid = aligned.transpose(1, 2).unflatten(2, (side, side))
        aligned = torch.nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    if family == "llava_onevision":
        aligned = model.base_model.apply_pooling(aligned)
    torch.testing.assert_close(found, aligned.flatten(0, 1), atol=1e-5, rtol=1e-4)
    assert found.shape == (sample.layout.patches, pairs[family].width)


def test_channels_travel_as_single_signals_do(tiny_host: Any) -> None:
    """Tiles of any-resolution images: all channels at once equal one after the other."""
    model, processor = tiny_host("llava_next")
    inputs = tiny.example_inputs("llava_next", processor)
    (sample,) = _listen(model, inputs, "encoder.mean_key@1", "encoder.received_attention@1")
    host, base = host_for(model), model.base_model
    features = sample.signal("encoder.mean_key@1")
    call = EncodeCall("image", {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]})
    call.items = host.describe(base, call)
    raw = torch.randn(call.items[0].units.stop, 64, 3)
    together = host.pool_channels(base, call, call.items[0], raw)
    alone = torch.stack([host.pool(base, call, call.items[0], part) for part in raw.unbind(-1)], -1)
    assert torch.equal(together, alone)
    assert features.shape == (sample.layout.patches, 8)


@pytest.mark.parametrize("family", SIGLIP)
def test_pooling_head(tiny_host: Any, pairs: dict[str, TextPair], family: str) -> None:
    """Vectors per frame and probe attention of the head, from the last states of the host's tower."""
    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor, videos=2)
    requests = ("encoder.head_attention@feature", "encoder.head_vector@feature")
    samples = _listen(model, inputs, *requests, text_tower=pairs[family])
    summary = pairs[family].summarise(_hidden(model, inputs)[-1])
    pooled = summary.attention[..., None]
    if family == "llava_onevision":
        pooled = model.base_model.apply_pooling(pooled)
    else:
        pooled = torch.nn.functional.avg_pool2d(pooled.view(-1, 1, 9, 9), 2).flatten(1)[..., None]
    frames = len(samples[0].layout.views)
    for number, sample in enumerate(samples):
        part = slice(number * frames, (number + 1) * frames)
        torch.testing.assert_close(sample.signal(requests[0]), pooled[part].flatten())
        torch.testing.assert_close(sample.signal(requests[1]), summary.vector[part])
        assert sample.view(1).signal(requests[1]).shape == (1, 32)


def test_views_of_tiled_images_have_one_vector_each(tiny_host: Any, pairs: dict[str, TextPair]) -> None:
    """The base picture's own, and the mean over the tiles of the mosaic."""
    model, processor = tiny_host("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor, videos=0, images=1)
    (sample,) = _listen(model, inputs, "encoder.head_vector@feature", text_tower=pairs["llava_onevision"])
    vectors = pairs["llava_onevision"].summarise(_hidden(model, inputs)[-1]).vector
    assert vectors.shape[0] > 2 and sample.frames == 2
    found = sample.signal("encoder.head_vector@feature")
    torch.testing.assert_close(found, torch.stack((vectors[0], vectors[1:].mean(0))))


def test_signals_of_frames_follow_dropped_frames(tiny_host: Any, pairs: dict[str, TextPair]) -> None:
    model, processor = tiny_host("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor)
    listener = Listener(wanted=("encoder.head_vector@feature",), text_tower=pairs["llava_onevision"])
    (whole,) = _listen(model, inputs, *listener.wanted, text_tower=pairs["llava_onevision"])
    with torch.no_grad(), tokensieve.compress(model, ["frame-subsample:retention=0.5", listener]):
        model(**inputs)
    (fewer,) = listener.seen
    vectors = whole.signal(listener.wanted[0])
    found = fewer.signal(listener.wanted[0])
    assert found.shape[0] == vectors.shape[0] // 2
    assert all(bool((vectors - row).abs().amax(1).min() < 1e-5) for row in found)


@pytest.mark.parametrize("family", QWEN)
def test_mean_query_attention(tiny_host: Any, family: str) -> None:
    """Against queries and keys recorded from the attention kernel, frame by frame, merged group by group."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor)
    calls: list[tuple[Tensor, Tensor]] = []
    eager = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def probe(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((q, k))
        return eager(module, q, k, v, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("probe", probe)
    tower = model.base_model.visual
    before = tower.config._attn_implementation
    try:
        for module in tower.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "probe"
        (sample,) = _listen(model, inputs, "encoder.mean_query_attention@last")
    finally:
        for module in tower.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = before
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop("probe")
    frames = len(sample.layout.views)
    expected = []
    for q, k in calls[-frames:]:
        groups = k[0].unflatten(1, (-1, 4)).mean(2)
        weights = (q[0].mean(1, keepdim=True) @ groups.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        expected.append(weights.mean((0, 1)))
    found = sample.signal("encoder.mean_query_attention@last").view(frames, -1)
    torch.testing.assert_close(found.sum(1), torch.ones(frames))
    ours, theirs = found, torch.stack(expected)
    if family == "qwen2_5_vl":
        # Windows permute the groups; the sets of values must agree, the places are tested with received attention.
        ours, theirs = ours.sort(1).values, theirs.sort(1).values
    torch.testing.assert_close(ours, theirs)


def test_undivided_heads(tiny_host: Any) -> None:
    """Keys as the projection gives them, and the attention of one wide head."""
    model, processor = tiny_host("llava")
    inputs = tiny.example_inputs("llava", processor)
    attention = model.base_model.vision_tower.get_submodule("encoder.layers")[-1].self_attn
    seen: dict[str, Tensor] = {}
    handles = [
        getattr(attention, f"{part}_proj").register_forward_hook(lambda m, a, out, part=part: seen.update({part: out}))
        for part in ("q", "k")
    ]
    requests = ("encoder.joined_keys@last", "encoder.joined_class_attention@last")
    (sample,) = _listen(model, inputs, *requests)
    for handle in handles:
        handle.remove()
    assert torch.equal(sample.signal(requests[0]), seen["k"][0, 1:])
    expected = (seen["q"] @ seen["k"].transpose(1, 2) * 32**-0.5).softmax(-1)[0, 0, 1:]
    torch.testing.assert_close(sample.signal(requests[1]), expected)


def test_clip_tower_of_a_video_host() -> None:
    """LLaVA-OneVision on a CLIP tower: no class token among the patches, pooled as the features are."""
    model, processor = tiny.build_in_memory(
        "llava_onevision",
        vision={"model_type": "clip_vision_model", "projection_dim": 32},
        config={"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    )
    pair = load_pair(*tiny.pair_of(model))
    inputs = tiny.example_inputs("llava_onevision", processor)
    requests = ("encoder.aligned@feature", "encoder.states@feature", "encoder.joined_class_attention@last")
    (sample,) = _listen(model, inputs, *requests, text_tower=pair)
    states = _hidden(model, inputs)[2][:, 1:]
    pool = model.base_model.apply_pooling
    torch.testing.assert_close(sample.signal(requests[0]), pool(pair.align(states)).flatten(0, 1))
    torch.testing.assert_close(sample.signal(requests[1]), pool(states).flatten(0, 1))
    assert sample.signal(requests[2]).shape == (sample.layout.patches,)
    for method in ("cdpruner", "recoverable-compression"):
        with torch.no_grad(), tokensieve.compress(model, method, text_tower=pair, tokenizer=processor) as run:
            model.generate(**inputs, max_new_tokens=2)
        assert run.history[-1].items[0].keep.numel() < sample.layout.patches


# -- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CLIP, *SIGLIP])
def test_words_of_every_row(tiny_host: Any, pairs: dict[str, TextPair], family: str) -> None:
    """Each row of a padded batch gets its own question, in the text tower's space and in the LLM's."""
    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor, batch=2)
    samples = _listen(model, inputs, *WORDS, text_tower=pairs[family], tokenizer=processor)
    texts = ("What happens in the video?", "Describe the motion of the square, please answer with one word.")
    table = model.base_model.get_input_embeddings().weight
    for sample, text in zip(samples, texts, strict=True):
        torch.testing.assert_close(sample.signal(WORDS[0]), pairs[family].embed_question(text))
        torch.testing.assert_close(sample.signal(WORDS[1]), pairs[family].embed_segments(text))
        words = sample.signal(WORDS[2])
        assert words.shape[1] == table.shape[1]
        ids = [int((table == word).all(1).nonzero()[0]) for word in words]
        assert processor.tokenizer.decode(ids).strip() == text
        newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        assert torch.equal(sample.signal(WORDS[3]), table[newline])
        assert torch.equal(sample.view(0).signal(WORDS[2]), words), "signals of the prompt are not cut into views"


def test_given_question_and_own_tokenizer(tiny_host: Any, pairs: dict[str, TextPair]) -> None:
    model, processor = tiny_host("llava")
    inputs = tiny.example_inputs("llava", processor, batch=2)
    samples = _listen(model, inputs, *WORDS[:3], text_tower=pairs["llava"], question="Where is the ball?")
    assert model.name_or_path, "the checkpoint is found by its name"
    for sample in samples:
        torch.testing.assert_close(sample.signal(WORDS[0]), pairs["llava"].embed_question("Where is the ball?"))
    assert torch.equal(samples[0].signal(WORDS[2]), samples[1].signal(WORDS[2]))
    scale = _listen(model, inputs, "prompt.similarity_scale", text_tower=pairs["llava"], question="Why?")[0]
    assert float(scale.signal("prompt.similarity_scale")) == pytest.approx(pairs["llava"].logit_scale)


def test_beams_share_their_question(tiny_host: Any, pairs: dict[str, TextPair]) -> None:
    model, processor = tiny_host("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor, batch=2)
    listener = Listener(wanted=WORDS[:1], text_tower=pairs["llava_onevision"])
    with torch.no_grad(), tokensieve.compress(model, listener):
        model.generate(**inputs, num_beams=2, max_new_tokens=2)
    found = [sample.signal(WORDS[0]) for sample in listener.seen]
    assert len(found) in (2, 4)
    assert not torch.allclose(found[0], found[-1])


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_no_known_pair_is_refused_with_a_reason(tiny_host: Any, family: str) -> None:
    model, _ = tiny_host(family)
    for wanted in ("encoder.aligned@feature", "prompt.question_embedding"):
        with pytest.raises(SignalError, match="no CLIP or SigLIP tower of which the text half is known"):
            tokensieve.compress(model, Listener(wanted=(wanted,)))


def test_pairs_of_the_wrong_kind(tiny_host: Any, pairs: dict[str, TextPair]) -> None:
    model, _ = tiny_host("llava")
    with pytest.raises(SignalError, match="no SigLIP tower"):
        tokensieve.compress(model, Listener(wanted=("encoder.head_vector@feature",), text_tower=pairs["llava"]))
    with pytest.raises(SignalError, match="belongs to another vision tower"):
        tokensieve.compress(model, Listener(wanted=WORDS[:1], text_tower=pairs["llava_onevision"]))
    model, _ = tiny_host("qwen2_vl")
    with pytest.raises(SignalError, match="no CLIP or SigLIP tower"):
        tokensieve.compress(model, Listener(wanted=WORDS[:1], text_tower=pairs["llava"]))
    with pytest.raises(SignalError, match="projector does not take patch by patch"):
        tokensieve.compress(model, Listener(wanted=("encoder.states@feature",)))


def test_structure_alone_loads_no_text_tower(tiny_host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models without weights answer whether a method fits, and nothing is fetched."""
    model, _ = tiny_host("llava")
    empty = meta_model(model.config)
    monkeypatch.setattr("tokensieve.hosts.base.find_source", lambda config: PairSource(None, "nowhere", 4))  # type: ignore[arg-type]
    run = tokensieve.compress(empty, "cdpruner")
    assert run.facts.text_tower == "nowhere"
    with pytest.raises(HostError, match=r"text tower .*nowhere cannot be loaded"):
        tokensieve.compress(model, "cdpruner", text_tower=str(tmp_path / "nowhere"))


def test_prompt_that_asks_nothing(tiny_host: Any) -> None:
    model, processor = tiny_host("qwen2_vl")
    inputs = tiny.example_inputs("qwen2_vl", processor, question=" ")
    with pytest.raises(HostError, match="asks nothing"):
        _listen(model, inputs, "prompt.question_words")
    with pytest.raises(MethodError, match="question is ' '"):
        Listener(question=" ")


def test_options_name_objects(pairs: dict[str, TextPair]) -> None:
    shown = Listener(text_tower=pairs["llava"], tokenizer=object()).options()
    assert shown["text_tower"] == pairs["llava"].source
    assert shown["tokenizer"] == "object"
