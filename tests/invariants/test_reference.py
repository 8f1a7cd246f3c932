"""The compressed model against a reference built by hand: rows alone, no cache, no hooks, explicit positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.hosts import tiny

PRUNERS = ["uniform:retention=0.3", "vidcom2:retention=0.3", "frame-subsample:retention=0.5"]


def _record(model: Any, inputs: Any) -> dict[str, Any]:
    """Inputs of the language model in an uncompressed forward pass of ``generate``."""
    seen: list[dict[str, Any]] = []
    handle = model.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    model.generate(**inputs, max_new_tokens=1)
    handle.remove()
    return seen[0]


def _visual(model: Any, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for name in ("image", "video"):
        token = getattr(model.config, f"{name}_token_id", None)
        if token is not None:
            mask |= ids == token
    return mask


def _order(model: Any, ids: torch.Tensor, item: Any) -> torch.Tensor:
    """Source positions of the compacted row, from the trace alone."""
    places = _visual(model, ids).nonzero().flatten()
    layout = item.layout
    separators = (~layout.is_patch).nonzero().flatten()
    tokens = layout.patch_tokens[item.keep]
    if layout.has_row_separators:
        # The released LLaVA-Video wrapper of VidCom2 puts the newlines of a frame behind its patches.
        behind = "frame_ratio" in item.info and item.layout.kind == "video"
        frame = {int(t): int(layout.view[t]) for t in torch.cat((tokens, separators)).tolist()}
        kept_frames = set(item.layout.patch_view[item.keep].tolist())
        separators = torch.tensor(
            [t for t in separators.tolist() if frame[t] in kept_frames or "frame_ratio" in item.info]
        )
        key = {t: (frame[t], behind and t in set(separators.tolist()), t) for t in frame}
        tokens = torch.tensor(sorted(tokens.tolist() + separators.tolist(), key=lambda t: key[t]))
    else:
        tokens = torch.cat((tokens, separators))
    text = (~_visual(model, ids)).nonzero().flatten()
    chosen = places[tokens]
    if (places.diff() == 1).all():
        start = int(places[0])
        return torch.cat((text[text < start], chosen, text[text > start]))
    return torch.cat((text, chosen)).sort().values


def _positions(full: torch.Tensor | None, order: torch.Tensor, length: int, axes: int) -> torch.Tensor:
    """Positions of ``order`` and of the tokens that follow: original on three axes, renumbered on one."""
    if axes == 1:
        return torch.arange(length)[None]
    assert full is not None
    kept = full[:, :1, order]
    kept[0] = torch.arange(order.numel())
    following = full[:, :1, -1:] + torch.arange(1, length - order.numel() + 1)
    following[0] = torch.arange(order.numel(), length)
    return torch.cat((kept, following), dim=-1)


@pytest.mark.parametrize("method", PRUNERS)
def test_prune_equals_hand_made_sequence(loaded: Any, family: str, method: str) -> None:
    """Greedy text of the compressed model equals decoding from the hand-made shorter prompt without a cache."""
    model, processor = loaded(family)
    inputs = tiny.example_inputs(family, processor)
    steps = 4
    with torch.no_grad():
        recorded = _record(model, inputs)
        with tokensieve.compress(model, method) as run:
            texts = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
            first = model(**inputs).logits[0]
        item = run.history[-1].items[0]
        order = _order(model, inputs["input_ids"][0], item)
        axes = run.facts.position_axes
        embeds = recorded["inputs_embeds"][:, order]
        extra: dict[str, Any] = {}
        if recorded.get("deepstack_visual_embeds") is not None:
            mask = _visual(model, inputs["input_ids"])
            rank = mask[0].long().cumsum(0) - 1
            kept = mask[0][order]
            planes = [plane[rank[order][kept]] for plane in recorded["deepstack_visual_embeds"]]
        head = model.get_output_embeddings()
        embed = model.get_input_embeddings()
        ids = texts[0, -steps:]
        for step in range(steps):
            length = embeds.shape[1]
            if recorded.get("deepstack_visual_embeds") is not None:
                tail = torch.zeros(length - order.numel(), dtype=torch.bool)
                extra = {"visual_pos_masks": torch.cat((kept, tail))[None], "deepstack_visual_embeds": planes}
            out = model.base_model.language_model(
                inputs_embeds=embeds,
                attention_mask=torch.ones(1, length, dtype=torch.long),
                position_ids=_positions(recorded.get("position_ids"), order, length, axes),
                use_cache=False,
                **extra,
            )
            scores = head(out.last_hidden_state)[0]
            if step == 0:
                assert torch.allclose(scores, first, atol=2e-5, rtol=1e-4)
            choice = scores[-1].argmax()
            assert int(choice) == int(ids[step]), f"step {step}"
            embeds = torch.cat((embeds, embed(choice)[None, None]), dim=1)
