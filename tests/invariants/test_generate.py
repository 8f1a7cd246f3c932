"""Everything that ``generate`` and plain ``forward`` can do still works."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tokensieve
from tokensieve.errors import HostError, MethodError
from tokensieve.hosts import tiny

CUTTERS = [
    "vidcom2:retention=0.3",
    "fastv:retention=0.3",
    "holitom:retention=0.4",
    "pyramiddrop:retention=0.3",
    "sparsevlm:retention=0.3",
]
WITH_VIDEO = [family for family in tiny.FAMILIES if tiny.FAMILIES[family].videos]


@pytest.fixture(params=CUTTERS)
def cutter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def greedy(model: Any, inputs: Any, tokens: int = 5, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)


@pytest.mark.parametrize("cutter", ["vidcom2:retention=0.3", "uniform:retention=0.3"])
def test_cache_equals_no_cache(loaded: Any, family: str, cutter: str) -> None:
    """Decoding with the compacted cache equals running the whole sequence anew for every token.

    Cuts inside the LLM rank by the newest token when the prompt is run again, so only methods in front of it are
    compared.
    """
    model, processor = loaded(family)
    inputs = tiny.example_inputs(family, processor, batch=2)
    with tokensieve.compress(model, cutter):
        assert torch.equal(greedy(model, inputs), greedy(model, inputs, use_cache=False))


def test_beams(loaded: Any, family: str, cutter: str) -> None:
    """Beam search over a padded batch equals beam search over the rows alone."""
    model, processor = loaded(family)
    inputs = tiny.example_inputs(family, processor, batch=2)
    options = {"num_beams": 3}
    with tokensieve.compress(model, cutter):
        together = greedy(model, inputs, **options)[:, -5:]
        for row in range(2):
            alone = tiny.example_inputs(family, processor, batch=2, row=row)
            assert torch.equal(together[row], greedy(model, alone, **options)[0, -5:])


def test_sampling_and_several_sequences(loaded: Any, family: str, cutter: str) -> None:
    """Sampling is reproducible and several sequences per prompt come out."""
    model, processor = loaded(family)
    inputs = tiny.example_inputs(family, processor, batch=2)
    with torch.no_grad(), tokensieve.compress(model, cutter) as run:
        outs = []
        for _ in range(2):
            torch.manual_seed(3)
            outs.append(model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2))
    assert outs[0].shape[0] == 4
    assert torch.equal(outs[0], outs[1])
    assert len(run.history[-1].items) in (2, 4)


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_several_videos_and_images(loaded: Any, family: str, cutter: str) -> None:
    """Two videos and an image in one prompt: every item is planned alone, and rows alone equal the batch."""
    model, processor = loaded(family)
    options = {"videos": 2, "images": 1}
    inputs = tiny.example_inputs(family, processor, batch=2, **options)
    with tokensieve.compress(model, cutter) as run:
        together = greedy(model, inputs)[:, -5:]
        items = run.history[-1].items
        for row in range(2):
            alone = tiny.example_inputs(family, processor, batch=2, row=row, **options)
            assert torch.equal(together[row], greedy(model, alone)[0, -5:])
    assert [item.row for item in items].count(0) == 3
    assert sorted(item.layout.kind for item in items if item.row == 0) == ["image", "video", "video"]


def test_right_padding_in_plain_forward(loaded: Any, family: str, cutter: str) -> None:
    """Logits of the last real token are those of the row alone."""
    model, processor = loaded(family)
    inputs = tiny.example_inputs(family, processor, batch=2, padding_side="right")
    with torch.no_grad(), tokensieve.compress(model, cutter) as run:
        together = model(**inputs).logits
        after = list(run.history[-1].after)
        for row in range(2):
            alone = tiny.example_inputs(family, processor, batch=2, row=row)
            expected = model(**alone).logits[0, -1]
            end = (after[row] if not run.history[-1].items[0].decoder else _last_length(run, row)) - 1
            assert torch.allclose(together[row, end], expected, atol=5e-5, rtol=1e-3)


def _last_length(run: Any, row: int) -> int:
    """Real tokens of the first row behind the last cut inside of the LLM."""
    for trace in reversed(run.history):
        if len(trace.before) == 2:
            item = next(item for item in trace.items if item.row == row)
            return trace.after[row] - item.keep.numel() + item.decoder[max(item.decoder)].numel()
    raise AssertionError("no batch of two was run")


def test_later_turn_on_a_kept_cache(loaded: Any, family: str, cutter: str) -> None:
    """A second question on the kept cache equals the whole conversation fed token by token."""
    model, processor = loaded(family)
    inputs = tiny.example_inputs(family, processor, batch=1)
    follow = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), tokensieve.compress(model, cutter):
        cache = DynamicCache(config=model.config.get_text_config())
        first = model.generate(**inputs, past_key_values=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        # All of the conversation so far, without its last answer token, is in the cache.
        assert cache.get_seq_length() == first.shape[1] - 1
        assert cache.layers[-1].get_seq_length() < first.shape[1] - 1
        conversation = torch.cat((first, follow), dim=1)
        second = model.generate(
            input_ids=conversation,
            attention_mask=torch.ones_like(conversation),
            past_key_values=cache,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
        )
        forced = tiny_forced(model, inputs, torch.cat((first[:, -3:], follow), dim=1), 3)
    assert torch.equal(second[0, -3:], forced)


def tiny_forced(model: Any, inputs: Any, given: torch.Tensor, tokens: int) -> torch.Tensor:
    """Decode ``given`` one token a step behind the prompt, then ``tokens`` greedily; ids of the latter."""
    queue = given[0].tolist()
    produced: list[int] = []

    def force(ids_so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if queue:
            forced = torch.full_like(scores, -1e9)
            forced[:, queue.pop(0)] = 0.0
            return forced
        produced.append(int(scores[0].argmax()))
        return scores

    from transformers import LogitsProcessorList

    model.generate(
        **inputs,
        max_new_tokens=len(given[0]) + tokens,
        min_new_tokens=len(given[0]) + tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([force]),
    )
    return torch.tensor(produced)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "internvl"])
def test_static_cache(loaded: Any, family: str, cutter: str) -> None:
    """A preallocated cache gives the text of the dynamic one."""
    model, processor = loaded(family)
    inputs = tiny.example_inputs(family, processor, batch=2)
    with tokensieve.compress(model, cutter):
        expected = greedy(model, inputs)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=expected.shape[1] + 8)
        got = greedy(model, inputs, past_key_values=cache)
    assert torch.equal(expected, got)


def test_labels_follow_the_tokens(loaded: Any, family: str) -> None:
    """The loss over text labels equals the cross entropy at the surviving text positions."""
    model, processor = loaded(family)
    inputs = tiny.example_inputs(family, processor)
    labels = inputs["input_ids"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    for name in ("image", "video"):
        token = getattr(model.config, f"{name}_token_id", None)
        if token is not None:
            labels[inputs["input_ids"] == token] = -100
    with torch.no_grad(), tokensieve.compress(model, "uniform:retention=0.3"):
        out = model(**inputs, labels=labels)
    count = int((labels != -100).sum())
    scores = out.logits[0, -count - 1 : -1].float()
    expected = torch.nn.functional.cross_entropy(scores, labels[0, -count:])
    tail_is_text = bool((labels[0, -count:] != -100).all())
    assert torch.isfinite(out.loss)
    assert not tail_is_text or torch.allclose(out.loss, expected, atol=1e-4)


def test_bf16_keeps_separated_selections(family: str) -> None:
    """Invariant 7: half precision changes neither counts nor, for separated scores, the selection."""
    model, processor = tiny.load(family)
    if family == "video_llama_3":
        processor.video_processor.use_token_compression = False
    inputs = tiny.example_inputs(family, processor)
    keeps = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype).eval()
        with torch.no_grad(), tokensieve.compress(model, "divprune:retention=0.1") as run:
            out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert out.shape[1] > inputs["input_ids"].shape[1]
        keeps.append(set(run.history[-1].items[0].keep.tolist()))
    assert len(keeps[0]) == len(keeps[1])
    assert len(keeps[0] & keeps[1]) >= 0.5 * len(keeps[0])


def _pre_encoding(model: Any) -> None:
    """Skip on versions of transformers whose models encode inside of ``forward`` only."""
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers takes no features that were encoded earlier")


def test_features_encoded_earlier(loaded: Any) -> None:
    """Features of one encoder call serve several questions."""
    model, processor = loaded("llava_onevision")
    _pre_encoding(model)
    inputs = dict(tiny.example_inputs("llava_onevision", processor))
    with torch.no_grad(), tokensieve.compress(model, "vidcom2:retention=0.3") as run:
        expected = model(**inputs).logits
        encoded = model.base_model.get_video_features(inputs.pop("pixel_values_videos"), return_dict=True)
        for _ in range(2):
            again = model(**inputs, mm_encoder_outputs={"video": encoded}).logits
            assert torch.equal(expected, again)
    assert len(run.history) == 3


def test_video_llama_3_with_its_own_compression(loaded: Any) -> None:
    """Ragged frames: selectors work on what the processor left; patch-aligned methods say what to do."""
    model, processor = loaded("video_llama_3")
    processor.video_processor.use_token_compression = True
    try:
        inputs = tiny.example_inputs("video_llama_3", processor, batch=2)
        with tokensieve.compress(model, "divprune:retention=0.3+fastv:retention=0.5") as run:
            greedy(model, inputs)
        layout = run.history[-1].items[0].layout
        assert not layout.is_uniform
        with (
            pytest.raises(MethodError, match="use_token_compression=False"),
            tokensieve.compress(model, "vidcom2"),
        ):
            greedy(model, inputs)
        with tokensieve.compress(model, "hiprune:retention=1.0"):
            same = greedy(model, inputs)
        assert torch.equal(same, greedy(model, inputs))
    finally:
        processor.video_processor.use_token_compression = False


def test_chunked_prefill_is_refused(loaded: Any) -> None:
    """A prompt cut into pieces would be compressed piece by piece; that is said, not done."""
    model, processor = loaded("llava_onevision")
    _pre_encoding(model)
    inputs = tiny.example_inputs("llava_onevision", processor)
    with pytest.raises(HostError, match="prefill_chunk_size"), tokensieve.compress(model, "vidcom2"):
        greedy(model, inputs, prefill_chunk_size=16)


def test_text_only_prompt_is_untouched(loaded: Any, family: str, cutter: str) -> None:
    """A prompt without pictures runs as if nothing were attached."""
    model, _ = loaded(family)
    inputs = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    expected = greedy(model, inputs)
    with tokensieve.compress(model, cutter) as run:
        assert torch.equal(expected, greedy(model, inputs))
    assert not run.history


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "llava_next_video"])
@pytest.mark.parametrize(
    "method", ["uniform:retention=0.3", "vidcom2:retention=0.3", "vidcom2:retention=0.3,positions=original"]
)
def test_later_turn_with_another_video(loaded: Any, family: str, method: str) -> None:
    """A new video in a second turn joins the compacted cache as if both had been in one prompt."""
    model, processor = loaded(family)
    one = tiny.example_inputs(family, processor, seed=1)
    two = tiny.example_inputs(family, processor, seed=2)
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        cache = DynamicCache(config=model.config.get_text_config())
        first = greedy(model, one, 3, past_key_values=cache)
        conversation = torch.cat((first, two["input_ids"]), dim=1)
        mask = torch.ones_like(conversation)
        second = model.generate(
            input_ids=conversation,
            attention_mask=mask,
            pixel_values_videos=two["pixel_values_videos"],
            past_key_values=cache,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
        )
        assert len(run.history[-1].items) == 1
        both = torch.cat((one["pixel_values_videos"], two["pixel_values_videos"]))
        expected = model.generate(
            input_ids=conversation,
            attention_mask=mask,
            pixel_values_videos=both,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
        )
        assert len(run.history[-1].items) == 2
    assert torch.equal(second, expected)


def test_cut_caches_take_another_video(loaded: Any) -> None:
    """Caches that are shorter behind a cut stay aligned when a later turn brings another video."""
    model, processor = loaded("llava_onevision")
    one = tiny.example_inputs("llava_onevision", processor, seed=1)
    two = tiny.example_inputs("llava_onevision", processor, seed=2)
    with torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        with tokensieve.compress(model, "fastv:retention=0.3"):
            first = greedy(model, one, 3, past_key_values=cache)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        conversation = torch.cat((first, two["input_ids"]), dim=1)
        inputs = {
            "input_ids": conversation,
            "attention_mask": torch.ones_like(conversation),
            "pixel_values_videos": two["pixel_values_videos"],
        }
        with tokensieve.compress(model, "vidcom2:retention=0.3") as run:
            greedy(model, inputs, 3, past_key_values=cache)
        grown = [layer.get_seq_length() for layer in cache.layers]
    # The pending answer token and the compressed second prompt, then two of the three new answer tokens.
    entered = run.history[-1].after[0] + 2
    assert [after - before for before, after in zip(lengths, grown, strict=True)] == [entered] * len(lengths)


def test_gradients_reach_the_features(loaded: Any) -> None:
    """Training through the compactor: kept tokens get gradients, dropped ones none."""
    model, processor = loaded("llava_onevision")
    inputs = dict(tiny.example_inputs("llava_onevision", processor))
    features: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        features.append(output)

    handle = model.base_model.multi_modal_projector.register_forward_hook(keep)
    labels = inputs["input_ids"].clone()
    labels[labels == model.config.video_token_id] = -100
    with tokensieve.compress(model, "uniform:retention=0.3"):
        model(**inputs, labels=labels).loss.backward()
    handle.remove()
    model.zero_grad()
    assert features[0].grad is not None
    assert float(features[0].grad.abs().sum()) > 0


def test_dispatched_model(loaded: Any, tmp_path: Any) -> None:
    """A model loaded with ``device_map`` (accelerate's hooks on every module) works alike."""
    from transformers import AutoModelForImageTextToText

    model, processor = loaded("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor, batch=2)
    dispatched = AutoModelForImageTextToText.from_pretrained(tiny.cached("llava_onevision"), device_map="cpu").eval()
    results = []
    for each in (model, dispatched):
        with tokensieve.compress(each, "vidcom2:retention=0.3+fastv:retention=0.5"):
            results.append(greedy(each, inputs))
    assert torch.equal(*results)


def test_language_model_called_alone(loaded: Any, cutter: str) -> None:
    """Token ids handed straight to the language model are none of our business."""
    model, _ = loaded("llava_onevision")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model.base_model.language_model(input_ids=ids).last_hidden_state
        with tokensieve.compress(model, cutter):
            assert torch.equal(model.base_model.language_model(input_ids=ids).last_hidden_state, expected)
