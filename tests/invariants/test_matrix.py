"""Invariants of the design, for every method on every host."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.registry import parse
from tokensieve.hosts import tiny

TOLERANCE = 2e-5


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def greedy(model: Any, inputs: Any, tokens: int = 4, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)


def prompt(family: str, processor: Any, **options: Any) -> Any:
    """A prompt with one video (one image for families without video)."""
    return tiny.example_inputs(family, processor, **options)


def test_retention_one_changes_no_bit(loaded: Any, family: str, method: str) -> None:
    """Invariant 1: all of it through the machinery, logits and text identical."""
    model, processor = loaded(family)
    inputs = prompt(family, processor, batch=2)
    before, text = logits(model, inputs), greedy(model, inputs)
    full = re.sub(r"retention=[0-9.]+", "retention=1.0", method)
    with tokensieve.compress(model, full) as run:
        after, text_after = logits(model, inputs), greedy(model, inputs)
    assert run.history, "the machinery did not run"
    assert torch.equal(before, after)
    assert torch.equal(text, text_after)


def test_padded_batch_equals_rows_alone(loaded: Any, family: str, method: str) -> None:
    """Invariant 2: uneven rows, left padding, logits of the last token and greedy text."""
    model, processor = loaded(family)
    batch = prompt(family, processor, batch=2)
    with tokensieve.compress(model, method):
        together = logits(model, batch)[:, -1]
        texts = greedy(model, batch)[:, -4:]
        for row in range(2):
            alone = prompt(family, processor, batch=2, row=row)
            assert torch.allclose(together[row], logits(model, alone)[0, -1], atol=TOLERANCE, rtol=1e-4)
            assert torch.equal(texts[row], greedy(model, alone)[0, -4:])


def test_counts_positions_and_text(loaded: Any, family: str, method: str) -> None:
    """Invariants 3 and 4: the declared number of tokens, text untouched and in order, original coordinates."""
    model, processor = loaded(family)
    inputs = prompt(family, processor)
    seen: list[dict[str, Any]] = []
    text_model = model.base_model.language_model

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)})

    with torch.no_grad():
        handle = text_model.register_forward_pre_hook(spy, with_kwargs=True)
        model.generate(**inputs, max_new_tokens=1)
        handle.remove()
        with tokensieve.compress(model, method) as run:
            handle = text_model.register_forward_pre_hook(spy, with_kwargs=True)
            model.generate(**inputs, max_new_tokens=1)
            handle.remove()
    full, short = seen
    trace = run.history[-1]
    deciding = next((m for m in parse(method) if {"frames", "tokens"} & set(m.stages)), None)
    least = 0 if any(m.may_be_empty for m in run.methods) else 1
    for item in trace.items:
        expected = deciding.token_count(item.layout) if deciding and "frames+" not in method else item.layout.patches
        if expected is not None and len(run.methods) == 1:
            assert item.keep.numel() == expected
        assert 1 <= item.keep.numel() <= item.layout.patches
        for layer, alive in item.decoder.items():
            assert least <= alive.numel() <= item.keep.numel(), layer
    whole = all(item.keep.numel() == item.layout.patches for item in trace.items)
    assert short["inputs_embeds"].shape[1] == trace.after[0]
    assert trace.after[0] == trace.before[0] if whole else trace.after[0] < trace.before[0]
    visual = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    for name in ("image", "video"):
        token = getattr(model.config, f"{name}_token_id", None)
        if token is not None:
            visual |= inputs["input_ids"][0] == token
    text = full["inputs_embeds"][0, ~visual]
    rows = (short["inputs_embeds"][0][:, None] == text[None]).all(-1)
    order = rows.float().argmax(0)
    assert bool(rows.any(0).all()), "a text token is missing"
    assert bool((order.diff() >= 0).all()) or text.unique(dim=0).shape[0] < text.shape[0]
    if run.positions == "original" and len(trace.items) == 1 and "position_ids" in full:
        kept = short["position_ids"][..., -1]
        assert torch.equal(kept[..., -1:], full["position_ids"][..., -1][..., -1:]) or kept.shape[0] == 4


def test_detach_restores_and_double_attach_raises(loaded: Any, family: str, method: str) -> None:
    """Invariant 5."""
    model, processor = loaded(family)
    inputs = prompt(family, processor)
    before = logits(model, inputs)

    def state() -> list[tuple[str, list[str], int]]:
        return [
            (name, sorted(vars(module)), len(module._forward_hooks) + len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ]

    reference = state()
    run = tokensieve.attach(model, method)
    try:
        with pytest.raises(tokensieve.TokensieveError, match="already has a method attached"):
            tokensieve.attach(model, method)
        logits(model, inputs)
    finally:
        run.detach()
    run.detach()
    assert state() == reference
    assert torch.equal(before, logits(model, inputs))


def test_same_seed_same_plan(loaded: Any, family: str, method: str) -> None:
    """Invariant 7, second half."""
    model, processor = loaded(family)
    inputs = prompt(family, processor)
    kept = []
    for _ in range(2):
        with tokensieve.compress(model, method) as run:
            logits(model, inputs)
        item = run.history[-1].items[0]
        kept.append((item.keep, item.decoder))
    assert torch.equal(kept[0][0], kept[1][0])
    assert all(torch.equal(kept[0][1][layer], kept[1][1][layer]) for layer in kept[0][1])


def test_every_registered_method_is_in_the_matrix(hosts_of: dict[str, list[str]]) -> None:
    """No method is left to the refusals alone, and most run on all hosts."""
    assert set(hosts_of) == set(tokensieve.list_methods())
    assert not [name for name, families in hosts_of.items() if not families]
    assert sum(len(families) == len(tiny.FAMILIES) for families in hosts_of.values()) > len(hosts_of) * 0.8


def test_cells_that_do_not_fit_say_why(loaded: Any, family: str, method: str, misfit: None) -> None:
    """No silent proxy: a missing signal is named, with the methods that work on this host."""
    model, _ = loaded(family)
    with pytest.raises(tokensieve.TokensieveError, match=r"cannot give: .*methods that work here: .*vidcom2"):
        tokensieve.compress(model, method)


def test_eager_equals_sdpa(loaded: Any, family: str, method: str) -> None:
    """Invariant 6: the attention kernel changes neither the plan nor the answer.

    Features differ in the last bits between kernels, so a token that sits on a threshold may fall on either side;
    rows whose plans agree must agree in their logits, and plans must agree but for such a token.
    """
    model, processor = loaded(family)
    inputs = prompt(family, processor, batch=2)
    results = []
    before = model.config._attn_implementation
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        with torch.no_grad(), tokensieve.compress(model, method) as run:
            scores = model(**inputs).logits[:, -1]
        results.append((scores, [item.keep for item in run.history[-1].items]))
    model.set_attn_implementation(before)
    for row, (one, other) in enumerate(zip(results[0][1], results[1][1], strict=True)):
        if torch.equal(one, other):
            assert torch.allclose(results[0][0][row], results[1][0][row], atol=1e-4, rtol=1e-3)
        else:
            shared = len(set(one.tolist()) & set(other.tolist()))
            assert shared >= max(one.numel(), other.numel()) - 1
