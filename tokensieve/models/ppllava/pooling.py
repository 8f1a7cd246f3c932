"""Prompt-guided pooling: a weighted average that slides over time, height and width (PPLLaVA, section 3.2).

The operator has no parameters. It takes the projected patch features of a clip and a relevance map that says how
well each patch fits the question (:mod:`.alignment` computes one), and returns one token per window. With kernel
and stride (2, 3, 3) a clip of 32 frames of 24 x 24 patches becomes 16 x 8 x 8 = 1024 tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokensieve.errors import MethodError

__all__ = [
    "IMAGE_KERNEL",
    "TEMPERATURE",
    "VIDEO_KERNEL",
    "Weighting",
    "Window",
    "prompt_guided_pool",
    "resolve_window",
    "window_weights",
]

Triple = tuple[int, int, int]
Weighting = Literal["window_softmax", "paper_raw", "window_renorm"]

VIDEO_KERNEL: Triple = (2, 3, 3)
"""Kernel and stride (time, rows, columns) for videos: 18 patches become one token."""

IMAGE_KERNEL: Triple = (1, 3, 3)
"""Kernel and stride for the views of an image and for several images: 9 patches become one token."""

TEMPERATURE = 0.01
"""Temperature of the softmax inside a window (released code)."""

_AXES = ("frames", "rows", "columns")

_SLAB = {"cpu": 2**18}
"""Elements of the running sum per device type: on a CPU it has to stay in the cache to be fast."""


@dataclass(frozen=True)
class Window:
    """Geometry of the pooling over (frames, rows, columns).

    Attributes
    ----------
    kernel, stride : tuple of int
        Size of a window and distance between neighbouring windows, in patches.
    output : tuple of int
        Windows per axis (T', h', w').
    """

    kernel: Triple
    stride: Triple
    output: Triple

    @property
    def tokens(self) -> int:
        """Tokens of one clip: T' * h' * w'."""
        return math.prod(self.output)


def resolve_window(
    size: Triple, *, kernel: Triple | None = None, stride: Triple | None = None, output_size: Triple | None = None
) -> Window:
    """Complete the geometry from the part of it that is given.

    Per axis of ``size`` patches, windows that would reach beyond the end are dropped, nothing is padded:

    ========================= ====================================================
    given                     the rest
    ========================= ====================================================
    nothing                   kernel = stride = :data:`VIDEO_KERNEL`
    kernel (or stride) only   stride = kernel
    kernel, stride            output = floor((size - kernel) / stride) + 1
    output size               stride = floor(size / output), kernel as below
    output size, stride       kernel = size - (output - 1) * stride
    output size, kernel       stride = floor((size - kernel) / (output - 1))
    all three                 must agree with each other
    ========================= ====================================================

    Parameters
    ----------
    size : tuple of int
        Frames, rows and columns (T, h, w) of the clip.
    kernel, stride, output_size : tuple of int, optional
        Each of three positive numbers.

    Returns
    -------
    Window
        The complete geometry.

    Raises
    ------
    MethodError
        If the numbers are not positive, contradict each other, or do not fit into ``size``.
    """
    given = {"kernel": kernel, "stride": stride, "output_size": output_size}
    for name, value in {"size": size, **given}.items():
        if value is not None and (len(value) != 3 or min(value) < 1):
            raise MethodError(f"{name} is {tuple(value)}; give three positive numbers (frames, rows, columns).")
    if output_size is None:
        kernel = kernel or stride or VIDEO_KERNEL
        stride = stride or kernel
    axes = []
    for axis in range(3):
        kernel_here, stride_here, output_here = (
            None if value is None else value[axis] for value in (kernel, stride, output_size)
        )
        axes.append(_resolve_axis(axis, size[axis], kernel_here, stride_here, output_here))
    kernels, strides, outputs = zip(*axes, strict=True)
    return Window(kernels, strides, outputs)


def _resolve_axis(axis: int, size: int, kernel: int | None, stride: int | None, output: int | None) -> Triple:
    """Kernel, stride and output of one axis."""
    if output is not None:
        if kernel is None:
            stride = stride or max(1, size // output)
            kernel = size - (output - 1) * stride
        elif stride is None:
            # One window never moves: any stride beyond the end says so.
            stride = (size - kernel) // (output - 1) if output > 1 else size
        elif (size - kernel) // stride + 1 != output:
            raise MethodError(
                f"kernel {kernel} and stride {stride} make {(size - kernel) // stride + 1} windows of {size} "
                f"{_AXES[axis]}, not the {output} that output_size asks for; give two of the three."
            )
    assert kernel is not None and stride is not None
    if stride < 1 or not 1 <= kernel <= size:
        raise MethodError(
            f"{size} {_AXES[axis]} have no room for windows of {kernel} with stride {stride}"
            f"{'' if output is None else f' ({output} windows)'}; choose a smaller kernel or output size."
        )
    return kernel, stride, (size - kernel) // stride + 1 if output is None else output


def window_weights(
    relevance: Tensor,
    window: Window,
    *,
    weighting: Weighting = "window_softmax",
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Weight of every patch inside every window, in float32 (float64 for a float64 map).

    Parameters
    ----------
    relevance : Tensor
        ``[..., T, h, w]``, normally a softmax over all positions of a clip.
    window : Window
        Geometry for (T, h, w).
    weighting : str
        ``"window_softmax"`` (released code): softmax of ``relevance / temperature`` inside the window.
        ``"paper_raw"`` (formula of the paper): the relevance itself; the weights of a window do not sum to 1, so
        features shrink by about T * h * w over the size of a window.
        ``"window_renorm"`` (not published): relevance over its sum in the window, which for a softmax map equals
        a softmax of the scaled cosines inside the window. A window whose sum is 0 in float32 is averaged.
    temperature : float
        Temperature of ``"window_softmax"``, above 0.

    Returns
    -------
    Tensor
        ``[..., T', h', w', k_t, k_h, k_w]``.

    Raises
    ------
    MethodError
        If ``weighting`` is unknown or ``temperature`` is not above 0.
    """
    values = relevance.to(torch.promote_types(relevance.dtype, torch.float32))
    for axis in range(3):
        # `unfold` appends its axis behind all others, so the axis to cut stays the third before the windows.
        values = values.unfold(relevance.dim() - 3 + axis, window.kernel[axis], window.stride[axis])
    # A stride that was rounded down can leave room for more windows than were asked for.
    frames, rows, columns = window.output
    values = values[..., :frames, :rows, :columns, :, :, :]
    if weighting == "paper_raw":
        return values
    values = values.flatten(-3)
    if weighting == "window_softmax":
        if not temperature > 0:
            raise MethodError(f"the temperature of the pooling is {temperature}; it has to be above 0.")
        # Subtracting in front of the division keeps tiny temperatures from overflowing.
        weights = ((values - values.amax(-1, keepdim=True)) / temperature).softmax(-1)
    elif weighting == "window_renorm":
        total = values.sum(-1, keepdim=True)
        empty = total <= 0
        weights = torch.where(empty, 1 / values.shape[-1], values / total.masked_fill(empty, 1))
    else:
        raise MethodError(f"weighting {weighting!r} is unknown; choose one of {', '.join(get_args(Weighting))}.")
    return weights.unflatten(-1, window.kernel)


def prompt_guided_pool(
    features: Tensor,
    relevance: Tensor | None = None,
    *,
    grid: tuple[int, int],
    kernel: Triple | None = None,
    stride: Triple | None = None,
    output_size: Triple | None = None,
    weighting: Weighting = "window_softmax",
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Pool the patches of a clip with the relevance of each patch as its weight (PPLLaVA, section 3.2).

    Weights and sums are float32 for any narrower input. Gradients reach features and relevance; no copy of the
    features is made on the way, and none larger than them on the way back.

    Parameters
    ----------
    features : Tensor
        ``[T, N, D]`` or ``[B, T, N, D]``: patch features, row-major in each frame. For the views of an image or
        for several images T counts these and the kernel is :data:`IMAGE_KERNEL`.
    relevance : Tensor, optional
        ``[T, h, w]`` or ``[B, T, h, w]``; None averages. To guide by scaled cosines without the underflow of a
        global softmax, pass them with ``temperature=1``.
    grid : tuple of int
        Rows and columns (h, w) of a frame, ``h * w = N``.
    kernel, stride, output_size : tuple of int, optional
        Geometry, see :func:`resolve_window`; kernel and stride (2, 3, 3) when nothing is given.
    weighting, temperature
        See :func:`window_weights`.

    Returns
    -------
    Tensor
        ``[T', h', w', D]`` or ``[B, T', h', w', D]`` in the dtype of ``features``; flattened over its window axes
        it is the token order of the language model (frame, row, column).

    Raises
    ------
    MethodError
        If the shapes contradict each other or the geometry does not fit.
    """
    if features.dim() not in (3, 4) or features.shape[-2] != grid[0] * grid[1]:
        raise MethodError(
            f"features of shape {list(features.shape)} are not [T, {grid[0] * grid[1]}, D] or [B, T, "
            f"{grid[0] * grid[1]}, D]; give the patches of a {grid[0]} x {grid[1]} grid without class token."
        )
    maps = features.unflatten(-2, grid)
    size = (maps.shape[-4], grid[0], grid[1])
    window = resolve_window(size, kernel=kernel, stride=stride, output_size=output_size)
    if relevance is None:
        share = torch.ones((), dtype=torch.promote_types(features.dtype, torch.float32), device=features.device)
        weights = (share / math.prod(window.kernel)).expand(*maps.shape[:-4], *window.output, *window.kernel)
    elif relevance.shape != maps.shape[:-1]:
        raise MethodError(
            f"the relevance map has the shape {list(relevance.shape)}, the patches of the features "
            f"{list(maps.shape[:-1])}; give one value per patch."
        )
    else:
        weights = window_weights(relevance, window, weighting=weighting, temperature=temperature)
    if features.dim() == 4:
        return _WindowSum.apply(maps, weights, window)
    return _WindowSum.apply(maps[None], weights[None], window)[0]


class _WindowSum(torch.autograd.Function):
    """Weighted sum of every window, one offset inside the windows after the other.

    Written out because autograd would answer every strided slice with a gradient of the size of all features.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor, window: Window) -> Tensor:
        """``features [B, T, h, w, D]``, ``weights [B, T', h', w', k_t, k_h, k_w]`` -> ``[B, T', h', w', D]``."""
        ctx.save_for_backward(features, weights)
        ctx.window = window
        dtype = torch.promote_types(features.dtype, weights.dtype)
        out = features.new_empty(*weights.shape[:4], features.shape[-1])
        for slab in _slabs(out):
            total = torch.zeros(out[:, slab].shape, dtype=dtype, device=out.device)
            for (frame, row, column), source in _sources(window, slab):
                share = weights[:, slab, :, :, frame, row, column, None]
                total.addcmul_(features[source].to(dtype), share)
            out[:, slab] = total
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of features and weights."""
        (grad,) = grads
        features, weights = ctx.saved_tensors
        window: Window = ctx.window
        wants_features, wants_weights, _ = ctx.needs_input_grad
        dtype = torch.promote_types(features.dtype, weights.dtype)
        overlap = any(k > d for k, d in zip(window.kernel, window.stride, strict=True))
        # Patches of one window only are written once, so that their gradient needs no wider sum.
        to_features = torch.zeros_like(features, dtype=dtype if overlap else None) if wants_features else None
        to_weights = torch.empty_like(weights, memory_format=torch.contiguous_format) if wants_weights else None
        for slab in _slabs(grad):
            part = grad[:, slab].to(dtype)
            for (frame, row, column), source in _sources(window, slab):
                if to_features is not None:
                    share = weights[:, slab, :, :, frame, row, column, None]
                    to_features[source].add_((part * share).to(to_features.dtype))
                if to_weights is not None:
                    to_weights[:, slab, :, :, frame, row, column] = (part * features[source]).sum(-1)
        return None if to_features is None else to_features.to(features.dtype), to_weights, None


def _slabs(out: Tensor) -> Iterator[slice]:
    """Ranges of output frames of ``[B, T', h', w', D]`` that are summed together."""
    frames = out.shape[1]
    limit = _SLAB.get(out.device.type, out.numel())
    step = min(frames, max(1, limit * frames // max(1, out.numel())))
    for start in range(0, frames, step):
        yield slice(start, min(start + step, frames))


def _sources(window: Window, slab: slice) -> Iterator[tuple[Triple, tuple[slice, ...]]]:
    """Every offset inside a window with the index that picks its patches out of ``[B, T, h, w, D]``."""
    starts = (slab.start, 0, 0)
    counts = (slab.stop - slab.start, *window.output[1:])
    frames, rows, columns = map(range, window.kernel)
    for offset in itertools.product(frames, rows, columns):
        ranges = []
        for first, inside, count, step in zip(starts, offset, counts, window.stride, strict=True):
            begin = first * step + inside
            ranges.append(slice(begin, begin + (count - 1) * step + 1, step))
        yield offset, (slice(None), *ranges)
