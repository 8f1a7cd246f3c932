"""Presentation times of all frames of a stream, and the repair of time stamps that cannot be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

# Intervals that differ by more than this many seconds are a variable frame rate; less is rounding.
VARIABLE_RATE_THRESHOLD = 3e-3

# A step back by more than this many seconds is a joint between recordings, not the reordering of B-frames.
_DISCONTINUITY = 1.0

# Rate that is assumed when a stream has neither time stamps nor a frame rate.
FALLBACK_RATE = Fraction(25)


@dataclass(frozen=True)
class Timeline:
    """When each frame of a stream is shown.

    Attributes
    ----------
    ticks : ndarray [N], int64
        Strictly ascending presentation times in units of ``time_base``.
    keys : ndarray [N], bool
        Which frames are keyframes (I-frames that decoding can start from).
    time_base : Fraction
        Seconds per tick.
    last_duration : float
        Seconds for which the last frame is shown if there is no interval to take it from.
    """

    ticks: NDArray[np.int64]
    keys: NDArray[np.bool_]
    time_base: Fraction
    last_duration: float = 0.0

    def __len__(self) -> int:
        """Return the number of frames N."""
        return len(self.ticks)

    @property
    def times(self) -> NDArray[np.float64]:
        """Seconds after the first frame, float64 [N]."""
        elapsed = (self.ticks - self.ticks[0]) * self.time_base.numerator
        return np.asarray(elapsed / self.time_base.denominator, dtype=np.float64)

    @property
    def start_time(self) -> float:
        """Presentation time of the first frame on the clock of the file, seconds."""
        return float(int(self.ticks[0]) * self.time_base)

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last (the median interval)."""
        if len(self) < 2:
            return self.last_duration
        return float(self.times[-1] + np.median(np.diff(self.ticks)) * float(self.time_base))

    @property
    def variable_rate(self) -> bool:
        """Whether intervals between frames differ by more than 3 ms."""
        if len(self) < 3:
            return False
        intervals = np.diff(self.ticks)
        return bool((intervals.max() - intervals.min()) * float(self.time_base) > VARIABLE_RATE_THRESHOLD)


def repair_ticks(ticks: Sequence[int], time_base: Fraction) -> NDArray[np.int64]:
    """Make presentation times strictly ascending.

    Frames leave a decoder in presentation order, so stamps that go back a little are stamps given to the
    wrong frame: sorting puts them right. Stamps that jump back far (joined recordings, a clock that
    wrapped) start a new part, which is moved behind the part before it.

    Parameters
    ----------
    ticks : sequence of int [N]
        Time stamps in presentation or storage order.
    time_base : Fraction
        Seconds per tick.

    Returns
    -------
    ndarray [N], int64
    """
    stamps = np.asarray(ticks, dtype=np.int64)
    if len(stamps) < 2:
        return stamps
    limit = max(round(_DISCONTINUITY / time_base), 2)
    highest = np.maximum.accumulate(stamps)
    joints = np.flatnonzero((stamps[1:] < highest[:-1] - limit) & (np.diff(stamps) < -limit)) + 1
    parts = [np.sort(part) for part in np.split(stamps, joints)]
    steps = np.concatenate([np.diff(part) for part in parts])
    step = max(int(np.median(steps[steps > 0])), 1) if np.any(steps > 0) else 1
    moved = [parts[0]]
    for part in parts[1:]:
        moved.append(part - part[0] + moved[-1][-1] + step)
    joined = np.concatenate(moved)
    # Equal stamps are pushed apart by one tick each: x[i] - i must not fall.
    places = np.arange(len(joined), dtype=np.int64)
    return np.asarray(np.maximum.accumulate(joined - places) + places)


def ticks_from_stamps(
    pts: Sequence[int | None], dts: Sequence[int | None], rate: Fraction | None, time_base: Fraction
) -> tuple[NDArray[np.int64], bool]:
    """Find presentation times from whatever stamps a stream carries.

    Parameters
    ----------
    pts, dts : sequence of int or None [N]
        Presentation and decoding stamps, in presentation or storage order.
    rate : Fraction or None
        Frame rate of the stream, used where stamps are missing.
    time_base : Fraction
        Seconds per tick.

    Returns
    -------
    ticks : ndarray [N], int64
        Strictly ascending presentation times.
    assumed : bool
        True if they had to be made up from a frame rate.
    """
    for stamps in (pts, dts):
        known = [stamp for stamp in stamps if stamp is not None]
        if known and len(known) == len(stamps):
            return repair_ticks(known, time_base), False
    interval = 1 / ((rate or FALLBACK_RATE) * time_base)
    first = next((stamp for stamp in pts if stamp is not None), 0)
    made = [first + round(place * interval) for place in range(len(pts))]
    return repair_ticks(made, time_base), True
