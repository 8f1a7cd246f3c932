"""VFlowOpt against maps, entropies and tokens of the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tokensieve.methods import vflowopt

SYSTEM = "vflowopt"
SIDE = 27
PIXELS = 384


def _check_importance(golden: dict[str, np.ndarray]) -> None:
    attention, entropy = torch.from_numpy(golden["attn"]), torch.from_numpy(golden["entropy"])
    importance = vflowopt.importance_map(attention, float(golden["t"]), entropy, float(golden["alpha"]))
    np.testing.assert_allclose(importance.numpy(), golden["importance"], rtol=0, atol=1e-6)


def _check_entropy(golden: dict[str, np.ndarray]) -> None:
    entropy = vflowopt.pixel_entropy(torch.from_numpy(golden["pixel_values"]))
    np.testing.assert_allclose(entropy.numpy(), golden["entropy"], rtol=0, atol=1e-5)


def _tiling(width: int, height: int) -> tuple[int, int]:
    """Tile columns and rows that show most of a picture, with the least waste among equals."""
    best, choice = (-1, 0), (1, 1)
    for columns in range(1, 4):
        for rows in range(1, 4):
            box_w, box_h = columns * PIXELS, rows * PIXELS
            scale = min(box_w / width, box_h / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            if (shown, -(box_w * box_h - shown)) > best:
                best, choice = (shown, -(box_w * box_h - shown)), (columns, rows)
    return choice


def _unpadded(grid: Tensor, width: int, height: int) -> Tensor:
    """The part ``[h, w, C]`` of a tile mosaic that the picture covers."""
    rows, columns = grid.shape[:2]
    if width / height > columns / rows:
        margin = (rows - int(height * (columns / width))) // 2
        return grid[margin : rows - margin]
    margin = (columns - int(width * (rows / height))) // 2
    return grid[:, margin : columns - margin]


def _check_image(golden: dict[str, np.ndarray]) -> None:
    features, newline = torch.from_numpy(golden["features"]), torch.from_numpy(golden["newline"])
    width, height = golden["image_size_wh"].tolist()
    columns, rows = _tiling(width, height)
    assert features.shape[0] == 1 + rows * columns
    both = torch.cat((features, torch.from_numpy(golden["importance"]).unsqueeze(2)), dim=2)
    mosaic = both[1:].view(rows, columns, SIDE, SIDE, -1).transpose(1, 2).reshape(rows * SIDE, columns * SIDE, -1)
    mosaic = _unpadded(mosaic, width, height)
    separator = torch.cat((newline, torch.ones(1))).expand(mosaic.shape[0], 1, -1)
    mosaic = torch.cat((mosaic, separator), dim=1)
    views = [both[0].view(SIDE, SIDE, -1), mosaic]
    sequence = torch.cat([view.flatten(0, 1) for view in views])
    places = [torch.cartesian_prod(*(torch.arange(size) for size in view.shape[:2])) for view in views]
    view = torch.cat([torch.full((len(place),), i) for i, place in enumerate(places)])
    row, column = torch.cat(places).unbind(1)
    retention, grid = float(golden["keep_ratio"]), float(golden["grid"])
    cell = vflowopt.grid_cells(view, row, column, grid)
    merged = vflowopt.prune_and_recycle(sequence[:, :-1], sequence[:, -1], cell, retention, grid)
    assert merged.features.shape == golden["out_features"].shape
    np.testing.assert_allclose(merged.features.numpy(), golden["out_features"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(sequence[merged.source, -1].numpy(), golden["out_importance"], rtol=0, atol=1e-5)
    # The same without passing the newlines, as a host does that never lets them compete.
    patch = (view == 0) | (column < mosaic.shape[1] - 1)
    alone = vflowopt.prune_and_recycle(
        sequence[patch, :-1], sequence[patch, -1], cell[patch], retention, grid, separators=int((~patch).sum())
    )
    assert torch.equal(patch.nonzero()[:, 0][alone.source], merged.source[patch[merged.source]])


def _pooled(signal: Tensor) -> Tensor:
    """Frame signals ``[F, 729, C]`` as the host pools its features, ``[F * 196, C]``."""
    grid = signal.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    half = torch.nn.functional.interpolate(grid, size=(14, 14), mode="bilinear")
    return half.flatten(2).transpose(1, 2).flatten(0, 1)


def _check_video(golden: dict[str, np.ndarray]) -> None:
    features = _pooled(torch.from_numpy(golden["features"]))
    importance = _pooled(torch.from_numpy(golden["importance"]).unsqueeze(2))[:, 0]
    keep = vflowopt.select_important(importance, float(golden["keep_ratio"]), separators=1)
    output = torch.cat((features[keep], torch.from_numpy(golden["newline"])[None]))
    assert output.shape == golden["out_features"].shape
    np.testing.assert_allclose(output.numpy(), golden["out_features"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(importance[keep].numpy(), golden["out_importance"][:-1], rtol=0, atol=1e-5)


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "attn" in golden:
        _check_importance(golden)
    elif "pixel_values" in golden:
        _check_entropy(golden)
    elif "out_features" not in golden:
        pytest.fail(f"a file with the arrays {sorted(golden)} is of no known kind")
    elif _is_video(golden):
        _check_video(golden)
    else:
        _check_image(golden)


def _is_video(golden: dict[str, np.ndarray]) -> bool:
    """Whether the output has the length of a video; pictures are recycled and have another."""
    frames = golden["features"].shape[0]
    total = frames * 196 + 1
    return golden["out_features"].shape[0] == vflowopt.survivors(total, float(golden["keep_ratio"]))
