"""DivPrune against values of the reference implementation: order, set and distances of the greedy choice."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch

from tokensieve.methods import divprune
from tokensieve.ops import diversity

SYSTEM = "divprune"


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    features = torch.from_numpy(golden["features"])
    keep, order, distances = divprune.select_diverse(features, float(golden["ratio"]))
    np.testing.assert_array_equal(order.numpy(), golden["selected_in_order"])
    np.testing.assert_array_equal(keep.numpy(), golden["selected_sorted"])
    np.testing.assert_allclose(distances.numpy(), golden["greedy_distance"], rtol=0, atol=1e-5)
    for strategy in get_args(diversity.Strategy):
        order, _ = diversity.farthest_point(features, keep.numel(), strategy=strategy)
        np.testing.assert_array_equal(order.numpy(), golden["selected_in_order"], err_msg=strategy)
