"""Prompt-guided pooling against average pooling: 32 frames of 576 tokens of width 4096 become 1024 tokens.

    python -m benchmarks.ppllava_pooling [--quick] [--dtype bfloat16] [--device cuda]

Time and peak memory of the operator alone, forward and forward with backward, beside three ways to average the same
windows without weights, all interleaved in one run. Memory is what a call needs on top of its input.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from benchmarks.results import RESULTS, SHARED, machine, median, show, write
from benchmarks.stopwatch import timed
from tokensieve.measure.memory import PeakMemory
from tokensieve.measure.text import in_seconds
from tokensieve.models.ppllava.pooling import VIDEO_KERNEL, prompt_guided_pool

__all__ = ["contestants", "main"]

COLUMNS = ("operator", "forward", "of the mean", "memory", "forward and backward", "of the mean", "memory")
MEAN = "average: mean of a reshaped view"


def contestants(features: Tensor, relevance: Tensor, side: int) -> dict[str, Callable[[], Tensor]]:
    """Operators on ``features [T, side * side, D]`` and ``relevance [T, side, side]``; the mean is the yardstick."""
    grid = (side, side)

    def mean() -> Tensor:
        cells = features.unflatten(1, (side // 3, 3, side // 3, 3)).unflatten(0, (-1, 2))
        return cells.mean((1, 3, 5))

    def torch_pool() -> Tensor:
        maps = features.unflatten(1, grid).permute(3, 0, 1, 2)[None]
        return avg_pool3d(maps, VIDEO_KERNEL)

    def guided(weighting: Any) -> Tensor:
        return prompt_guided_pool(features, relevance, grid=grid, weighting=weighting)

    found: dict[str, Callable[[], Tensor]] = {MEAN: mean}
    if features.device.type != "cpu" or features.dtype == torch.float32:
        # PyTorch has no such kernel for narrow types on a CPU.
        found["average: avg_pool3d of a permuted view"] = torch_pool
    found["average: this operator without weights"] = partial(prompt_guided_pool, features, grid=grid)
    for weighting in ("window_softmax", "window_renorm", "paper_raw"):
        found[f"guided: {weighting}"] = partial(guided, weighting)
    return found


def train(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """Forward and backward; gradients are let go."""
    out = call()
    used = [leaf for leaf in leaves if leaf.requires_grad]
    torch.autograd.grad(out, used, torch.ones_like(out), allow_unused=True)


def memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call needs at its peak beyond what is in use before it."""
    gc.collect()
    # What the C library keeps of earlier calls would hide what this one needs.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    mark = PeakMemory(device)
    mark.start()
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else psutil.Process().memory_info().rss
    kept = call()
    mark.stop()
    del kept
    return max(0, mark.read() - before)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppllava_pooling", description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=32, help="even number")
    parser.add_argument("--side", type=int, default=24, help="patches per row, a multiple of 3")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.frames % 2 or arguments.side % 3:
        parser.error("the mean of a reshaped view needs an even number of frames and a side that is a multiple of 3")
    torch.set_num_threads(1)
    frames, side, device = arguments.frames, arguments.side, arguments.device
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(frames, side * side, arguments.width, generator=generator)
    features = features.to(device, getattr(torch, arguments.dtype)).requires_grad_()
    relevance = (4 * torch.randn(frames, side, side, generator=generator)).flatten().softmax(0)
    relevance = relevance.view(frames, side, side).to(device).requires_grad_()
    calls = contestants(features, relevance, side)
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in calls}
    peaks: dict[str, dict[str, int]] = {}
    for _ in range(2 if arguments.quick else arguments.repeats):
        for name, call in calls.items():
            with torch.no_grad():
                seconds[name]["forward"].append(timed(call, device))
            both = partial(train, call, (features, relevance))
            seconds[name]["both"].append(timed(both, device))
    for name, call in calls.items():
        with torch.no_grad():
            forward = memory(call, device)
        peaks[name] = {"forward": forward, "both": memory(partial(train, call, (features, relevance)), device)}
    rows = []
    for name in calls:
        row = [name]
        for kind in ("forward", "both"):
            spent, unit = median(seconds[name][kind]), median(seconds[MEAN][kind])
            row += [in_seconds(spent), f"{spent / unit:.2f}", f"{peaks[name][kind] / 1e6:.0f} MB"]
        rows.append(row)
    size = features.numel() * features.element_size() / 1e6
    title = (
        f"Prompt-guided pooling of {frames} x {side * side} x {arguments.width} ({arguments.dtype}, {size:.0f} MB) by "
        f"{VIDEO_KERNEL}, {device.type}, one thread"
    )
    show(title, COLUMNS, rows)
    notes = (
        SHARED,
        "memory: peak of the call beyond its input, results included (CPU: resident set; CUDA: allocator).",
        "backward: gradients of the features, and of the relevance map where there is one.",
    )
    payload = {
        "machine": {**machine(device), "dtype": arguments.dtype},
        "settings": {**vars(arguments), "device": str(device), "output": None},
        "seconds": seconds,
        "peak_bytes": peaks,
    }
    path = write(arguments.output, "ppllava_pooling", payload, title, [("", COLUMNS, rows)], notes)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
