"""DART against the outputs of its reference implementation."""

from __future__ import annotations

from typing import Any

import torch

from tokensieve.core.sample import DecoderSample
from tokensieve.methods.dart import DART, KEYS, NORMED, STATES, adopt, adoption_quotas, key_pivots, python_set_order

SYSTEM = "dart"


def test_against_reference(golden: dict[str, Any]) -> None:
    """Pivots, quotas, adopted groups and kept tokens exact, in the reference's order of pivots and in ours."""
    start, visual = int(golden["image_start"]), int(golden["image_length"])
    states = torch.from_numpy(golden["hidden"])[start:]
    keys = torch.from_numpy(golden["key"]).transpose(0, 1).flatten(1)[start:]
    image, text = key_pivots(keys, visual, int(golden["pivot_image"]), int(golden["pivot_text"]))
    assert (image + start).tolist() == golden["image_pivots"].tolist()
    assert (text + start).tolist() == golden["text_pivots"].tolist()
    amount = float(golden["ratio_or_count"])
    method = DART(image_pivots=int(golden["pivot_image"]), text_pivots=int(golden["pivot_text"]))
    if amount > 1:
        method.tokens = int(amount)
    else:
        method.retention = 1 - amount
    quotas = adoption_quotas(
        visual, method.retention, image.numel(), image.numel() + text.numel(), tokens=method.tokens
    )
    assert set(quotas) == {int(golden["tokens_per_pivot"])}
    turns = python_set_order(image.tolist(), text.tolist(), start)
    assert [turn + start for turn in turns] == golden["pivot_order"].tolist()
    groups = adopt(states, visual, turns, quotas)
    assert [(group + start).tolist() for group in groups] == golden["groups"].tolist()
    kept = torch.cat((image, *groups)).sort().values + start
    assert kept.tolist() == golden["kept"].tolist()
    zeros = torch.zeros(visual, dtype=torch.long)
    sample = DecoderSample(states[:visual], 2, visual, zeros, zeros, {KEYS: keys, NORMED: states})
    assert (method.plan_decoder(sample).keep + start).tolist() == golden["kept_ascending_order"].tolist()
    method.pivot_order, sample.text_item = "cpython", torch.full((start,), -1)
    assert (method.plan_decoder(sample).keep + start).tolist() == golden["kept"].tolist()
    # In front of the LLM embeddings stand for both.
    sample.layer, sample.signals = 0, {STATES: states}
    expected, texts = key_pivots(states, visual, image.numel(), text.numel())
    turns = python_set_order(expected.tolist(), texts.tolist(), start)
    groups = adopt(states, visual, turns, quotas)
    assert method.plan_decoder(sample).keep.tolist() == torch.cat((expected, *groups)).sort().values.tolist()
