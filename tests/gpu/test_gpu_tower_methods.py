"""Methods inside the vision tower, VFlowOpt and relevance mappers decide on a CUDA device as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.hosts import tiny
from tokensieve.methods.explainability_compression import MapperConfig, RelevanceMapper
from tokensieve.methods.explainability_compression.labels import label

pytestmark = pytest.mark.gpu

CELLS = [
    ("llava", "tome:retention=0.3"),
    ("llava_onevision", "tome:retention=0.3"),
    ("internvl", "tome:r=4,inflect=-1"),
    ("llava", "flowcut:retention=0.3"),
    ("llava_next", "flowcut:retention=0.2"),
    ("llava_onevision", "vflowopt:retention=0.25,alpha=0.3"),
    ("llava_next", "vflowopt:retention=0.25"),
    ("qwen2_5_vl", "vflowopt:retention=0.25"),
]


def _on(inputs: Any, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}


def _run(model: Any, inputs: Any, method: str) -> tuple[torch.Tensor, list[Any]]:
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        scores = model(**inputs).logits[:, -1]
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return scores.float().cpu(), run.history[0].items


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_same_plan(cuda: torch.device, on_cuda: Callable[..., Any], family: str, method: str) -> None:
    """In float32 the plans agree but for tokens on a threshold; logits agree where plans do."""
    model, processor = tiny.build_in_memory(family)
    inputs = tiny.example_inputs(family, processor, batch=2)
    expected, items = _run(model, inputs, method)
    found, moved = _run(on_cuda(family)[0], _on(inputs, cuda), method)
    for row, (one, other) in enumerate(zip(items, moved, strict=True)):
        assert len(set(one.keep.tolist()) ^ set(other.keep.tolist())) <= 2
        if torch.equal(one.keep, other.keep) and all(
            torch.equal(one.decoder[k], other.decoder[k]) for k in one.decoder
        ):
            assert torch.allclose(found[row], expected[row], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_half_precision_runs(cuda: torch.device, on_cuda: Callable[..., Any], family: str, method: str) -> None:
    """Counts are those of float32."""
    model, processor = on_cuda(family, torch.bfloat16)
    inputs = _on(tiny.example_inputs(family, processor, batch=2), cuda)
    inputs = {name: x.bfloat16() if name.startswith("pixel_values") else x for name, x in inputs.items()}
    scores, items = _run(model, inputs, method)
    assert bool(torch.isfinite(scores).all())
    wide, _ = on_cuda(family)
    _, expected = _run(wide, _on(tiny.example_inputs(family, processor, batch=2), cuda), method)
    for one, other in zip(items, expected, strict=True):
        assert abs(one.keep.numel() - other.keep.numel()) <= max(2, 0.2 * other.keep.numel())


def test_relevance(cuda: torch.device, on_cuda: Callable[..., Any], tmp_path: Path) -> None:
    """Labels and predictions on the device equal those on the CPU."""
    family = "llava_onevision"
    model, processor = tiny.build_in_memory(family)
    inputs = dict(tiny.example_inputs(family, processor))
    (expected,) = label(model, inputs, torch.tensor([77, 78]))
    (found,) = label(on_cuda(family)[0], _on(inputs, cuda), torch.tensor([77, 78]))
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(found.attention, expected.attention, rtol=1e-3, atol=1e-6)
    RelevanceMapper(MapperConfig(channels=(8, 16))).save(tmp_path)
    method = f"explainability-compression:retention=0.3,weights={tmp_path}"
    _, items = _run(model, inputs, method)
    _, moved = _run(on_cuda(family)[0], _on(inputs, cuda), method)
    assert len(set(items[0].keep.tolist()) ^ set(moved[0].keep.tolist())) <= 2
