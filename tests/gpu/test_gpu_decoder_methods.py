"""Methods inside the LLM run and decide on a CUDA device as on the CPU, whole and in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.hosts import tiny

pytestmark = pytest.mark.gpu

METHODS = (
    "pyramiddrop:retention=0.3",
    "sparsevlm:retention=0.3",
    "sparsevlm:retention=0.1,version=1.0",
    "sparsevlm:retention=0.3,version=2.0",
    "dart:retention=0.3",
    "transprune:retention=0.2",
    "framefusion:retention=0.4",
    "aim:retention=0.5",
    "aim:retention=0.5,exact=true",
    "todre:retention=0.4,threshold=1.01",
    "prunevid:retention=0.5",
    "lvlm-csp:retention=0.1",
    "lvlm-csp:retention=0.1,scatter=delta",
    "catp:retention=0.3",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_same_sets(cuda: torch.device, family: str, method: str) -> None:
    """First cut as on the CPU in a padded batch; text of the right length."""
    model, processor = tiny.load(family)
    inputs = tiny.example_inputs(family, processor, batch=2)
    first: list[list[list[int]]] = []
    for device in (torch.device("cpu"), cuda):
        model = model.to(device).eval()
        with torch.no_grad(), tokensieve.compress(model, method) as run:
            out = model.generate(**inputs.to(device), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        first.append([sorted(item.decoder[min(item.decoder)].tolist()) for item in run.history[-1].items])
    assert first[0] == first[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_half_precision(on_cuda: Any, method: str, kernel: str) -> None:
    """bfloat16 under both kernels: finite logits and fewer tokens behind the last cut."""
    model, processor = on_cuda("llava_onevision", torch.bfloat16, kernel)
    inputs = tiny.example_inputs("llava_onevision", processor, batch=2).to(model.device)
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        scores = model(**inputs).logits
    assert torch.isfinite(scores.float()).all()
    for item in run.history[-1].items:
        assert item.decoder[max(item.decoder)].numel() < item.keep.numel()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_cache_entries_chosen_step_by_step(cuda: torch.device, kernel: str) -> None:
    """Logits of every decoding step of DyCoke as on the CPU, in a padded batch."""
    model, processor = tiny.load("llava_onevision")
    model.set_attn_implementation(kernel)
    inputs = tiny.example_inputs("llava_onevision", processor, batch=2)
    scores = []
    for device in (torch.device("cpu"), cuda):
        model = model.to(device).eval()
        with torch.no_grad(), tokensieve.compress(model, "dycoke:retention=0.4,layer=2"):
            out = model.generate(
                **inputs.to(device),
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        scores.append(torch.stack(out.logits).cpu())
    assert torch.allclose(scores[0], scores[1], atol=1e-3, rtol=1e-3)


def test_in_front_of_the_first_layer(on_cuda: Any) -> None:
    """DART on input embeddings in bfloat16: every cache holds the same."""
    model, processor = on_cuda("llava_onevision", torch.bfloat16, "sdpa")
    inputs = tiny.example_inputs("llava_onevision", processor, batch=2).to(model.device)
    with torch.no_grad(), tokensieve.compress(model, "dart:retention=0.3,layer=0") as run:
        out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    assert all(item.decoder[0].numel() < item.keep.numel() for item in run.history[-1].items)
