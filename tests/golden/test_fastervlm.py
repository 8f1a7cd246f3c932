"""FasterVLM against patch ids and features of the reference implementation."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.methods import fastervlm

SYSTEM = "fastervlm"


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    attention = torch.from_numpy(golden["cls_attention"])
    kept = fastervlm.rank_patches(attention, int(golden["keep_per_frame"]))
    np.testing.assert_array_equal(kept.numpy(), golden["kept"])
    features = torch.from_numpy(golden["features"])
    output = features.gather(1, kept.unsqueeze(2).expand(-1, -1, features.shape[2]))
    np.testing.assert_array_equal(output.numpy(), golden["output"])
