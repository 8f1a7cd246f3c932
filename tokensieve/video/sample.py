"""Which frames to take: pure functions from presentation times to frame indices."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tokensieve.errors import VideoError

Sampling = Literal["uniform", "fps", "keyframe", "timestamps", "all"]

# Seconds by which a stamp may lie behind the wanted time and still count as "at" it (rounding of decimals).
_TIME_TOLERANCE = 1e-6


@dataclass(frozen=True)
class SampleRequest:
    """What a caller asked for; see :func:`tokensieve.video.read_clip` for the meaning of the fields."""

    sampling: Sampling = "uniform"
    frames: int = 32
    fps: float | None = None
    timestamps: Sequence[float] | None = None
    start: float | None = None
    end: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if self.sampling not in get_args(Sampling):
            names = ", ".join(get_args(Sampling))
            raise VideoError(f"sampling {self.sampling!r} is unknown; choose one of {names}.")
        object.__setattr__(self, "frames", _positive_integer("frames", self.frames))
        if self.max_frames is not None:
            object.__setattr__(self, "max_frames", _positive_integer("max_frames", self.max_frames))
        self._check_fps()
        self._check_timestamps()
        self._check_range()

    def _check_fps(self) -> None:
        if self.sampling != "fps":
            if self.fps is not None:
                raise VideoError(f"fps={self.fps} has no use with sampling={self.sampling!r}; pass sampling='fps'.")
            return
        if self.fps is None:
            raise VideoError("sampling='fps' needs the number of frames per second; pass for example fps=1.")
        object.__setattr__(self, "fps", _finite("fps", self.fps))
        if self.fps <= 0:
            raise VideoError(f"fps must be above 0, not {self.fps}; pass for example fps=1.")

    def _check_timestamps(self) -> None:
        if self.sampling != "timestamps":
            if self.timestamps is not None:
                raise VideoError(f"timestamps have no use with sampling={self.sampling!r}; pass sampling='timestamps'.")
            return
        if self.timestamps is None:
            raise VideoError("sampling='timestamps' needs the times in seconds; pass timestamps=[...].")
        if isinstance(self.timestamps, str | bytes) or np.ndim(self.timestamps) != 1:
            raise VideoError(f"timestamps must be a list of seconds, not {self.timestamps!r}.")
        times = tuple(_finite("each timestamp", time) for time in self.timestamps)
        if not times:
            raise VideoError("timestamps is empty; pass at least one time in seconds.")
        for before, after in pairwise(times):
            if after < before:
                raise VideoError(f"timestamps must ascend, but {after} follows {before}; sort them.")
        if self.start is not None or self.end is not None:
            raise VideoError("start and end have no use with sampling='timestamps'; leave them out.")
        object.__setattr__(self, "timestamps", times)

    def _check_range(self) -> None:
        for name in ("start", "end"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _finite(name, getattr(self, name)))
        if self.start is not None and self.start < 0:
            raise VideoError(f"start must be 0 or more seconds, not {self.start}.")
        if self.end is not None and self.end <= (self.start or 0.0):
            raise VideoError(f"end must lie after start, but end={self.end} and start={self.start or 0.0}.")


@dataclass(frozen=True)
class Selection:
    """Chosen frames.

    Attributes
    ----------
    indices : ndarray [T], int64
        Ascending frame indices; repeats occur only for repeated ``timestamps``.
    span : float
        Seconds of video that the frames stand for.
    warnings : list of str
        What could not be done as asked.
    """

    indices: NDArray[np.int64]
    span: float
    warnings: list[str] = field(default_factory=list)


def uniform_indices(total: int, count: int) -> NDArray[np.int64]:
    """Spread ``count`` frames over ``total`` from the first to the last, as lmms-eval does for LLaVA.

    The positions are ``linspace(0, total - 1, count)`` cut to integers. A clip with fewer frames than asked
    gives each of its frames once.

    Parameters
    ----------
    total, count : int
        Frames there are and frames wanted, both at least 1.

    Returns
    -------
    ndarray [min(total, count)], int64
    """
    return np.linspace(0, total - 1, min(count, total), dtype=np.int64)


def fps_indices(
    times: NDArray[np.float64], fps: float, start: float, stop: float, tolerance: float = _TIME_TOLERANCE
) -> NDArray[np.int64]:
    """Take the frame that is on screen at ``start``, ``start + 1/fps``, ... before ``stop``, each frame once.

    Parameters
    ----------
    times : ndarray [N], float64
        Ascending presentation times, seconds.
    fps : float
        Frames per second to take.
    start, stop : float
        Half-open range of times, seconds.
    tolerance : float
        Seconds by which a frame may be late and still count, because containers round times to ticks.

    Returns
    -------
    ndarray [T], int64
    """
    # Frame i is on screen for grid positions x_i <= k < x_{i+1}; it is taken if an integer k lies in between.
    # Counting this way needs no list of grid times, which could be huge for an absurd fps.
    begin = (times - start - tolerance) * fps
    begin[0] = min(begin[0], 0.0)
    begin = np.maximum(begin, 0.0)
    # A still image lasts no time at all, yet it is on screen at the start.
    limit = max((stop - start) * fps, float(np.finfo(np.float64).tiny))
    finish = np.minimum(np.append(begin[1:], limit), limit)
    return np.flatnonzero(np.ceil(begin) < finish).astype(np.int64)


def keyframe_indices(keys: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Take the keyframes, thinned uniformly to at most ``count``.

    Parameters
    ----------
    keys : ndarray [N], bool
        Which frames are keyframes.
    count : int
        Most frames to return.

    Returns
    -------
    ndarray [T], int64
    """
    return thin(np.flatnonzero(keys).astype(np.int64), count)


def timestamp_indices(times: NDArray[np.float64], wanted: Sequence[float]) -> NDArray[np.int64]:
    """Take the frame on screen at each wanted time: the last one that starts at or before it.

    Parameters
    ----------
    times : ndarray [N], float64
        Ascending presentation times, seconds.
    wanted : sequence of float [T]
        Times, seconds; those outside of the clip give its first or last frame.

    Returns
    -------
    ndarray [T], int64
    """
    places = np.searchsorted(times, np.asarray(wanted, dtype=np.float64) + _TIME_TOLERANCE, side="right") - 1
    return np.clip(places, 0, len(times) - 1).astype(np.int64)


def thin(indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Keep at most ``count`` of the indices, evenly spread and with both ends."""
    if len(indices) <= count:
        return indices
    return indices[uniform_indices(len(indices), count)]


def select(
    request: SampleRequest,
    times: NDArray[np.float64],
    keys: NDArray[np.bool_],
    duration: float,
    tick: float = _TIME_TOLERANCE,
) -> Selection:
    """Choose frames for a request.

    Parameters
    ----------
    request : SampleRequest
        Checked request.
    times : ndarray [N], float64
        Presentation times in seconds after the first frame.
    keys : ndarray [N], bool
        Which frames are keyframes.
    duration : float
        Seconds until the end of the last frame.
    tick : float
        Resolution of ``times``, seconds.

    Returns
    -------
    Selection

    Raises
    ------
    VideoError
        If the range lies after the clip, or more than ``max_frames`` frames were asked for by number.
    """
    warnings: list[str] = []
    if request.sampling == "timestamps":
        return _select_timestamps(request, times, duration)
    first, last = _range(request, times, duration)
    low = request.start or 0.0
    high = duration if request.end is None else min(request.end, duration)
    span = high - low
    if request.sampling == "uniform":
        _check_count(request, min(request.frames, last - first), "fewer frames")
        chosen = first + uniform_indices(last - first, request.frames)
    elif request.sampling == "all":
        _check_count(request, last - first, "a smaller range or sampling='uniform'")
        chosen = np.arange(first, last, dtype=np.int64)
    elif request.sampling == "keyframe":
        chosen = first + keyframe_indices(keys[first:last], _least(request.frames, request.max_frames))
        if not len(chosen):
            before = np.flatnonzero(keys[:first])
            chosen = before[-1:] if len(before) else np.array([first])
            warnings.append(
                f"no keyframe lies between {low:g} s and {high:g} s; that at {times[chosen[0]]:g} s was taken"
            )
    else:
        assert request.fps is not None
        # Half a tick, since stamps are rounded to ticks; never more than the eye of a millisecond clock.
        tolerance = max(min(tick / 2, 5e-4), _TIME_TOLERANCE)
        chosen = first + fps_indices(times[first:last], request.fps, low, high, tolerance)
        grid = max(math.ceil(span * request.fps - tolerance * request.fps), 1)
        if len(chosen) == grid:
            span = grid / request.fps
        if request.max_frames is not None and len(chosen) > request.max_frames:
            warnings.append(
                f"{request.fps:g} frames per second are {len(chosen)} frames; thinned to {request.max_frames}"
            )
            chosen, span = thin(chosen, request.max_frames), high - low
    return Selection(chosen, span, warnings)


def _select_timestamps(request: SampleRequest, times: NDArray[np.float64], duration: float) -> Selection:
    assert request.timestamps is not None
    wanted = request.timestamps
    _check_count(request, len(wanted), "fewer timestamps")
    warnings = []
    outside = [time for time in wanted if time < 0 or time > duration + _TIME_TOLERANCE]
    if outside:
        warnings.append(
            f"{len(outside)} of {len(wanted)} timestamps lie outside of the clip (0 to {duration:g} s), "
            f"for example {outside[0]:g}; the nearest frame was taken"
        )
    chosen = timestamp_indices(times, wanted)
    covered = float(times[chosen[-1]] - times[chosen[0]])
    span = covered * len(chosen) / (len(chosen) - 1) if covered > 0 else duration
    return Selection(chosen, span, warnings)


def _range(request: SampleRequest, times: NDArray[np.float64], duration: float) -> tuple[int, int]:
    """Half-open index range of the frames that start within [start, end), never empty."""
    low = request.start or 0.0
    if low > 0 and low >= max(duration, times[-1] + _TIME_TOLERANCE):
        raise VideoError(f"start={low:g} lies after the end of the clip ({duration:g} s); choose an earlier start.")
    first = int(np.searchsorted(times, low - _TIME_TOLERANCE, side="left"))
    last = len(times)
    if request.end is not None:
        last = int(np.searchsorted(times, request.end - _TIME_TOLERANCE, side="left"))
    if first >= last:
        # Between two frames: the one that is still on screen.
        first = max(first - 1, 0)
        last = first + 1
    return first, last


def _check_count(request: SampleRequest, count: int, remedy: str) -> None:
    if request.max_frames is not None and count > request.max_frames:
        raise VideoError(
            f"{count} frames are more than max_frames={request.max_frames}; ask for {remedy}, or raise it."
        )


def _least(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def _positive_integer(name: str, value: object) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise VideoError(f"{name} must be a whole number above 0, not {value!r}.") from None
    if isinstance(value, bool) or number <= 0:
        raise VideoError(f"{name} must be a whole number above 0, not {value!r}.")
    return number


def _finite(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise VideoError(f"{name} must be a number, not {value!r}.") from None
    if not math.isfinite(number):
        raise VideoError(f"{name} must be finite, not {number}.")
    return number
