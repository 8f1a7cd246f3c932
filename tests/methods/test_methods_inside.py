"""Everything that ``generate`` does, for methods that change what single layers of the LLM see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tokensieve
from tokensieve.core.registry import method_class
from tokensieve.hosts import tiny

METHODS = [
    "framefusion:retention=0.3",
    "dycoke:retention=0.4",
    "dart:retention=0.3,layer=0",
    "lvlm-csp:retention=0.1",
    "catp:retention=0.3",
    "prunevid:retention=0.5",
    "todre:retention=0.4,threshold=1.01,pivot=center",
    "aim:retention=0.5",
    "aim:retention=0.5,exact=true",
]
FAMILIES = ["llava_onevision", "qwen2_5_vl"]
FOLLOWING = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    model, processor = tiny.load(request.param)
    return request.param, model.eval(), processor


def _greedy(model: Any, inputs: Any, tokens: int = 5, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)


def test_beams(loaded: tuple[str, Any, Any], method: str) -> None:
    """Beam search over a padded batch with several items equals beam search over the rows alone."""
    family, model, processor = loaded
    options: dict[str, Any] = {"videos": 2, "images": 1}
    inputs = tiny.example_inputs(family, processor, batch=2, **options)
    with tokensieve.compress(model, method):
        together = _greedy(model, inputs, num_beams=3)[:, -5:]
        for row in range(2):
            alone = tiny.example_inputs(family, processor, batch=2, row=row, **options)
            assert torch.equal(together[row], _greedy(model, alone, num_beams=3)[0, -5:])


def test_static_cache(loaded: tuple[str, Any, Any], method: str) -> None:
    """A preallocated cache gives the text of the growing one."""
    family, model, processor = loaded
    inputs = tiny.example_inputs(family, processor, batch=2)
    with tokensieve.compress(model, method):
        expected = _greedy(model, inputs)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=expected.shape[1] + 8)
        assert torch.equal(_greedy(model, inputs, past_key_values=cache), expected)


def test_eager_equals_sdpa(loaded: tuple[str, Any, Any], method: str) -> None:
    """The attention kernel does not change the text of a padded batch."""
    family, model, processor = loaded
    inputs = tiny.example_inputs(family, processor, batch=2)
    texts = []
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        with tokensieve.compress(model, method):
            texts.append(_greedy(model, inputs))
    assert torch.equal(*texts)


def test_later_turns(loaded: tuple[str, Any, Any], method: str) -> None:
    """A second question on the kept cache, then a second video."""
    family, model, processor = loaded
    inputs = tiny.example_inputs(family, processor)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        first = _greedy(model, inputs, 3, past_key_values=cache)
        assert cache.get_seq_length() == first.shape[1] - 1
        conversation = torch.cat((first, FOLLOWING), dim=1)
        mask = torch.ones_like(conversation)
        second = _greedy(model, {"input_ids": conversation, "attention_mask": mask}, 3, past_key_values=cache)
        assert len(run.history) == 1
        again = dict(tiny.example_inputs(family, processor))
        again["input_ids"] = torch.cat((second, inputs["input_ids"]), dim=1)
        again["attention_mask"] = torch.ones_like(again["input_ids"])
        if "mm_token_type_ids" in again:
            again["mm_token_type_ids"] = torch.cat((torch.zeros_like(second), inputs["mm_token_type_ids"]), dim=1)
        third = _greedy(model, again, 3, past_key_values=cache)
        assert len(run.history) == 2
        assert third.shape[1] == again["input_ids"].shape[1] + 3
        assert cache.get_seq_length() == third.shape[1] - 1


def test_behind_a_method_in_front(loaded: tuple[str, Any, Any], method: str) -> None:
    """Composition with a tokens-stage method, where the method has no such stage of its own."""
    family, model, processor = loaded
    name = method.partition(":")[0]
    if "tokens" in method_class(name).stages:
        with pytest.raises(tokensieve.TokensieveError, match="tokens stage"):
            tokensieve.attach(model, f"vidcom2+{method}")
        return
    inputs = tiny.example_inputs(family, processor, batch=2)
    with tokensieve.compress(model, f"vidcom2:retention=0.5+{method}") as run:
        together = _greedy(model, inputs)[:, -5:]
        assert all(item.keep.numel() < item.layout.patches for item in run.history[-1].items)
        for row in range(2):
            alone = tiny.example_inputs(family, processor, batch=2, row=row)
            assert torch.equal(together[row], _greedy(model, alone)[0, -5:])
