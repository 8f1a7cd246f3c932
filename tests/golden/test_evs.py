"""EVS against values of the reference implementation: counts, scores, masks, positions of the engine."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.sample import TokenSample
from tokensieve.methods import evs
from tokensieve.ops.mrope import engine_positions, media_positions

SYSTEM = "evs"


def _check_mask(golden: dict[str, np.ndarray]) -> None:
    steps, rows, columns = (golden["grid_thw"] // [1, golden["merge"], golden["merge"]]).tolist()
    rate = float(golden["q"])
    flat = torch.from_numpy(golden["feat"])
    features = flat.view(steps, rows * columns, -1)
    scores = evs.dissimilarity(features)
    np.testing.assert_allclose(scores.numpy(), golden["dissimilarity"], rtol=0, atol=1e-6)
    assert evs.retained_count(steps, rows * columns, rate) == int(golden["count"])
    mask = evs.retention_mask(features, rate)
    np.testing.assert_array_equal(mask.flatten().long().numpy(), golden["mask"])
    np.testing.assert_array_equal(mask.sum(1).numpy(), golden["per_frame"])

    # The registered method, as the runtime calls it.
    method = evs.EVS(retention=1.0 - rate)
    layout = Layout.regular("video", steps, rows, columns)
    plan = method.run_tokens(TokenSample(flat, layout))
    np.testing.assert_array_equal(plan.keep.numpy(), golden["kept"])
    assert plan.features is None
    assert method.token_count(layout) == int(golden["count"])


def _check_positions(golden: dict[str, np.ndarray]) -> None:
    table = media_positions(
        golden["grid_thw"].tolist(),
        int(golden["merge"]),
        tokens_per_second=float(golden["tokens_per_second"]),
        seconds_per_grid=float(golden["second_per_grid"]),
    )
    np.testing.assert_array_equal(table.numpy(), golden["media_positions"])
    ids = torch.from_numpy(golden["input_ids"])
    positions, delta = engine_positions(
        ids,
        [table[torch.from_numpy(golden["kept_in_media"])]],
        torch.arange(ids.numel()).expand(3, -1),
        vision_start=int(golden["vision_start_id"]),
        media_ids=[int(golden["video_token_id"]), int(golden["image_token_id"])],
    )
    np.testing.assert_array_equal(positions.numpy(), golden["positions"])
    assert delta == int(golden["delta"])


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "media_positions" in golden:
        _check_positions(golden)
    else:
        _check_mask(golden)
