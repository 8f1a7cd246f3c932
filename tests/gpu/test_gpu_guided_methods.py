"""Methods that need a text tower decide on a CUDA device as on the CPU, wherever the text tower stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.hosts import tiny
from tokensieve.pairing import load_pair

pytestmark = pytest.mark.gpu

CELLS = (
    ("llava", "cdpruner", {}),
    ("llava_next_video", "cdpruner", {"scope": "video"}),
    ("llava_onevision", "fastvid", {"segments": 2}),
    ("llava_onevision", "unicomp", {"metric": "features", "frame_radius": -1.0}),
    ("llava", "recoverable-compression", {}),
)


@pytest.mark.parametrize(("family", "method", "options"), CELLS, ids=[f"{cell[0]}-{cell[1]}" for cell in CELLS])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_same_plan(on_cuda: Any, cuda: torch.device, family: str, method: str, options: Any, place: str) -> None:
    model, processor = on_cuda(family)
    on_cpu, _ = tiny.build_in_memory(family)
    inputs = tiny.example_inputs(family, processor)
    pair_model, tokenizer = tiny.pair_of(on_cpu)
    keeps = []
    for one, where in ((on_cpu, "cpu"), (model, place)):
        pair = load_pair(pair_model.to(where), tokenizer)
        call = {**options, "text_tower": pair, "tokenizer": processor, "retention": 0.3}
        with torch.no_grad(), tokensieve.compress(one, method, **call) as run:
            one(**{key: value.to(one.device) for key, value in inputs.items()})
        keeps.append(run.history[-1].items[0].keep)
        assert next(pair_model.parameters()).device.type == where, "the user's model stays where it is"
    assert torch.equal(*keeps)
