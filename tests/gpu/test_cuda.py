"""Behaviour that only a CUDA device can show: same selections, half precision, kernels, offloading, events, memory."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import tokensieve
from tokensieve.hosts import tiny

pytestmark = pytest.mark.gpu

Loader = Callable[..., tuple[Any, Any]]
METHODS = ("vidcom2", "holitom", "divprune", "hiprune", "fastv", "mean-pool", "frame-subsample")
FAMILIES = ("llava_onevision", "llava_video", "qwen2_5_vl", "qwen3_vl")
ROOT = Path(__file__).parents[2]


def _inputs(family: str, processor: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """Prompts of the tiny models; pixels take the model's dtype."""
    made = tiny.example_inputs(family, processor, **options)
    return {
        name: value.to(device, dtype) if value.is_floating_point() and "pixel" in name else value.to(device)
        for name, value in made.items()
    }


def _forward(model: Any, inputs: dict[str, Any], method: str, **options: Any) -> tuple[torch.Tensor, tokensieve.Run]:
    with torch.no_grad(), tokensieve.compress(model, method, **options) as run:
        logits = model(**inputs).logits[:, -1].float()
    return logits, run


@pytest.fixture
def exact_matmul() -> Any:
    """Float32 products in full precision, so that both devices round alike."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("exact_matmul")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_the_same_tokens_as_on_the_cpu(family: str, method: str, cuda: torch.device, on_cuda: Loader) -> None:
    """Float32: identical selections in front of and inside the LLM, and logits within 1e-3."""
    model, processor = on_cuda(family)
    cpu_model, _ = tiny.build_in_memory(family)
    logits, run = _forward(model, _inputs(family, processor, cuda, torch.float32, frames=6), method, retention=0.3)
    reference = _inputs(family, processor, torch.device("cpu"), torch.float32, frames=6)
    expected, cpu_run = _forward(cpu_model, reference, method, retention=0.3)
    for item, other in zip(run.history[-1].items, cpu_run.history[-1].items, strict=True):
        assert torch.equal(item.keep, other.keep)
        assert all(torch.equal(item.decoder[layer], other.decoder[layer]) for layer in other.decoder)
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_answers_and_full_retention_changes_nothing(
    family: str, dtype: torch.dtype, cuda: torch.device, on_cuda: Loader
) -> None:
    """Retention 1 is bit-identical; retention 0.3 gives finite logits and the promised number of tokens."""
    model, processor = on_cuda(family, dtype)
    inputs = _inputs(family, processor, cuda, dtype, batch=2)
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1].float()
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    same, _ = _forward(model, inputs, "vidcom2", retention=1.0)
    assert torch.equal(same, plain)
    fewer, run = _forward(model, inputs, "divprune+fastv", retention=0.5)
    assert bool(torch.isfinite(fewer).all())
    patches = run.report.patches
    assert patches.share() == pytest.approx(0.5, abs=0.02) and patches.share("last") == pytest.approx(0.25, abs=0.02)
    with torch.no_grad(), tokensieve.compress(model, "vidcom2", retention=1.0):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), answer)


@pytest.mark.usefixtures("exact_matmul")
@pytest.mark.parametrize("method", ["vidcom2", "holitom", "fastv", "hiprune"])
def test_sdpa_equals_eager(method: str, cuda: torch.device, on_cuda: Loader) -> None:
    """A padded batch; statistics of attention do not depend on the kernel."""
    results = []
    for attention in ("sdpa", "eager"):
        model, processor = on_cuda("llava_onevision", torch.float32, attention)
        inputs = _inputs("llava_onevision", processor, cuda, torch.float32, batch=2)
        results.append(_forward(model, inputs, method, retention=0.4))
    (logits, run), (expected, other) = results
    for item, reference in zip(run.history[-1].items, other.history[-1].items, strict=True):
        assert torch.equal(item.keep, reference.keep)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="the flash_attn package is not installed")
@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("method", ["vidcom2", "fastv"])
def test_flash_attention_equals_sdpa(method: str, positions: str, cuda: torch.device, on_cuda: Loader) -> None:
    """Gaps in the positions must not look like packed sequences to the kernel; uneven rows, then decoding."""
    answers = []
    for attention in ("sdpa", "flash_attention_2"):
        model, processor = on_cuda("llava_onevision", torch.bfloat16, attention)
        inputs = _inputs("llava_onevision", processor, cuda, torch.bfloat16, batch=2)
        logits, _ = _forward(model, inputs, method, retention=0.4, positions=positions)
        answers.append(logits)
    torch.testing.assert_close(answers[0], answers[1], atol=0.15, rtol=0.05)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the accelerate package is not installed")
@pytest.mark.parametrize("method", ["vidcom2", "holitom", "fastv"])
def test_layers_on_several_devices(method: str, cuda: torch.device) -> None:
    """Late decoder layers on another device (a second GPU, or offloaded to the CPU): masks and tables follow."""
    other: Any = 1 if torch.cuda.device_count() > 1 else "cpu"
    placed = {f"model.language_model.layers.{layer}": 0 if layer < 3 else other for layer in range(5)}
    parts = ("vision_tower", "multi_modal_projector", "image_newline", "language_model.embed_tokens")
    placed |= {f"model.{name}": 0 for name in (*parts, "language_model.norm", "language_model.rotary_emb")}
    placed["lm_head"] = 0
    folder = tiny.cached("llava_onevision")
    spread = AutoModelForImageTextToText.from_pretrained(folder, device_map=placed).eval()
    single, processor = tiny.load("llava_onevision")
    single.to(cuda)
    inputs = _inputs("llava_onevision", processor, cuda, torch.float32)
    logits, run = _forward(spread, inputs, method, retention=0.4)
    expected, reference = _forward(single, inputs, method, retention=0.4)
    assert torch.equal(run.history[-1].items[0].keep, reference.history[-1].items[0].keep)
    torch.testing.assert_close(logits.to(cuda), expected, atol=2e-3, rtol=2e-3)
    with torch.no_grad(), tokensieve.compress(spread, method, retention=0.4):
        assert (
            spread.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
        )


def test_clock_reads_cuda_events(cuda: torch.device, on_cuda: Loader) -> None:
    """Stage times are those of the device: positive, and together no longer than the call."""
    model, processor = on_cuda("llava_onevision", torch.bfloat16)
    inputs = _inputs("llava_onevision", processor, cuda, torch.bfloat16, frames=8)
    with torch.no_grad(), tokensieve.compress(model, "fastv", retention=0.5) as run:
        model.generate(**inputs, max_new_tokens=4)
        run.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    report = run.report
    assert report.calls["decode"] == 3
    assert all(report.seconds[stage] > 0 for stage in ("encode", "compress", "prefill", "decode"))
    assert sum(report.seconds.values()) <= wall * 1.05
    assert report.memory_kind == "CUDA allocator" and report.peak_memory > 0


def test_a_cut_inside_the_llm_does_not_raise_the_peak(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastV reads one row of attention, never a matrix; 6000 visual tokens would show it."""
    monkeypatch.syspath_prepend(str(ROOT))
    geometry = importlib.import_module("benchmarks.geometry")
    sizes = geometry.GEOMETRIES["llava-onevision-0.5b-narrow-tower"]
    model = geometry.build(sizes, cuda, torch.bfloat16)
    inputs = geometry.prompt(sizes, model)

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=2)
        return torch.cuda.max_memory_allocated()

    peak()
    full = peak()
    for method in ("fastv", "vidcom2", "holitom"):
        with tokensieve.compress(model, method, retention=0.5):
            assert peak() <= full * 1.02, method


def test_gpu_benchmark_runs_on_the_device(cuda: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole command on miniature models, on the device."""
    monkeypatch.syspath_prepend(str(ROOT))
    main = importlib.import_module("benchmarks.gpu.__main__").main
    command = ["--smoke", "--batch", "1", "--repeats", "1", "--long-tokens", "3", "--output", str(tmp_path)]
    assert main([*command, "--methods", "random", "vidcom2"]) == 0
    assert (tmp_path / "gpu-smoke.md").exists()
