"""Getting the wanted frames out of a stream with as little decoding as possible.

Frames can be reached in two ways. Where a container states presentation times, a frame is recognised by its
time, and decoding starts at the keyframe before it wherever that is less work than reading on. Elsewhere, or
when the first way meets damage, the whole stream is decoded and frames are counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from tokensieve.video.container import Decoder, StreamFacts, open_container, read_packets
from tokensieve.video.convert import Orientation, SizeLimits, to_rgb
from tokensieve.video.packets import PacketIndex
from tokensieve.video.source import OpenSource
from tokensieve.video.timeline import Timeline, ticks_from_stamps

# What a seek costs, in packets that could be decoded meanwhile: the decoder's threads run empty and refill.
SEEK_COST = 12

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """A stretch of packets to decode.

    Attributes
    ----------
    first, last : int
        Storage positions of the first and last packet that are fed.
    seek : bool
        Whether to jump to ``first``; otherwise it is the beginning of the stream.
    """

    first: int
    last: int
    seek: bool


class FrameStore:
    """Room for the wanted frames, allocated once; nothing else that is decoded is kept.

    Parameters
    ----------
    wanted : ndarray [U], int64
        Ascending, distinct frame indices.
    facts : StreamFacts
        The stream, for size and orientation.
    limits : SizeLimits
        Bounds on size.
    progress : callable, optional
        Called with (frames so far, frames wanted) after each frame.
    """

    def __init__(
        self,
        wanted: NDArray[np.int64],
        facts: StreamFacts,
        limits: SizeLimits,
        progress: Progress | None = None,
    ) -> None:
        self.wanted = wanted
        self.filled = np.zeros(len(wanted), dtype=np.bool_)
        self.orientation: Orientation = facts.orientation
        self.stored_size = limits.target(facts.width, facts.height)
        self.native_size = (facts.width, facts.height)
        width, height = self.orientation.size(*self.stored_size)
        limits.check(len(wanted), width, height)
        self.frames = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
        self.progress = progress
        self.resized = 0
        self.flawed = 0
        self.damaged = 0

    def put(self, index: int, frame: Any) -> None:
        """Keep a decoded frame if its index is wanted and still missing."""
        slot = int(np.searchsorted(self.wanted, index))
        if slot >= len(self.wanted) or self.wanted[slot] != index or self.filled[slot]:
            return
        self.frames[slot] = self.orientation.apply(to_rgb(frame, *self.stored_size))
        self.filled[slot] = True
        self.resized += (frame.width, frame.height) != self.native_size
        self.flawed += bool(frame.is_corrupt)
        if self.progress is not None:
            self.progress(int(self.filled.sum()), len(self.wanted))


def plan_runs(packets: PacketIndex, wanted: NDArray[np.int64], seek_cost: float = SEEK_COST) -> list[Run]:
    """Plan which packets to decode to get the wanted frames.

    For each frame the decoder can start at the last keyframe that is neither stored nor shown after it.
    (Frames stored after a keyframe but shown before it may need pictures from before the keyframe.)

    Parameters
    ----------
    packets : PacketIndex
        All packets of the stream.
    wanted : ndarray [U], int64
        Frame indices in presentation order.
    seek_cost : float
        Packets that may be decoded in vain rather than seeking.

    Returns
    -------
    list of Run
    """
    runs: list[Run] = []
    key_places = np.flatnonzero(packets.keys)
    for place in np.sort(packets.shown[wanted]):
        before = int(np.searchsorted(key_places, place, side="right")) - 1
        while before >= 0 and packets.pts[key_places[before]] > packets.pts[place]:
            before -= 1
        start = int(key_places[before]) if before >= 0 else 0
        if runs and start - runs[-1].last <= seek_cost:
            runs[-1] = Run(runs[-1].first, int(place), runs[-1].seek)
        elif not runs and start <= seek_cost:
            runs.append(Run(0, int(place), False))
        else:
            runs.append(Run(start, int(place), True))
    return runs


class Outcome(Enum):
    """How fetching frames by their times went."""

    DONE = auto()
    UNSEEKABLE = auto()
    INCOMPLETE = auto()


def fetch_by_time(
    opened: OpenSource, facts: StreamFacts, packets: PacketIndex, store: FrameStore, runs: list[Run]
) -> Outcome:
    """Decode the planned runs, recognising frames by their presentation times.

    Returns
    -------
    Outcome
        ``UNSEEKABLE`` if the container cannot seek; ``INCOMPLETE`` if a frame is missing or the stream does
        not keep to its time stamps. The store may then hold some of the frames.
    """
    places = packets.shown[store.wanted]
    with open_container(opened) as container:
        stream = container.streams[facts.index]
        stream.thread_type = "AUTO"
        decoder = Decoder(stream)
        for run in runs:
            source = _packets_from(container, stream, packets, run)
            if source is None:
                return Outcome.UNSEEKABLE
            due = {int(stamp) for stamp in packets.pts[places[(places >= run.first) & (places <= run.last)]]}
            latest = None
            for frame in _decode_until(decoder, source, due):
                if frame.pts is None or (latest is not None and frame.pts <= latest):
                    return Outcome.INCOMPLETE
                latest = frame.pts
                index = packets.index_of(frame.pts)
                if index is not None and frame.pts in due:
                    store.put(index, frame)
    store.damaged = decoder.damaged
    return Outcome.DONE if store.filled.all() else Outcome.INCOMPLETE


def _decode_until(decoder: Decoder, source: Iterator[Any], due: set[int]) -> Iterator[Any]:
    """Feed packets until those with the given times are fed and their frames are out."""
    unfed, missing = set(due), set(due)
    for packet in source:
        unfed.discard(packet.pts)
        for frame in decoder.feed(packet):
            missing.discard(frame.pts)
            yield frame
        if not unfed or not missing:
            break
    if missing:
        # All that the wanted frames need has been fed, so emptying the decoder brings them out.
        yield from decoder.feed(None)


def _packets_from(container: Any, stream: Any, packets: PacketIndex, run: Run) -> Iterator[Any] | None:
    """Return the packets from the first of a run on, or None if the container cannot seek there."""
    if not run.seek:
        return demux(container, stream)
    start_pts, start_dts = int(packets.pts[run.first]), int(packets.dts[run.first])
    second = round(1 / packets.timeline.time_base)
    # Some containers look for decoding times, some have a coarse index: look ever further back.
    for offset in dict.fromkeys((start_pts, start_dts, start_dts - second, start_dts - 10 * second)):
        try:
            container.seek(offset, stream=stream, backward=True, any_frame=False)
        except (av.error.FFmpegError, OSError, ValueError):
            continue
        source = demux(container, stream)
        for packet in source:
            if packet.pts == start_pts and packet.is_keyframe:
                return chain((packet,), source)
            index = packets.index_of(packet.pts)
            if index is not None and packets.shown[index] > run.first:
                break
    return None


def demux(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of a stream up to its end or the first read error."""
    try:
        yield from read_packets(container, stream)
    except (av.error.FFmpegError, OSError, ValueError):
        return


def fetch_by_place(opened: OpenSource, facts: StreamFacts, store: FrameStore, careful: bool) -> Timeline | None:
    """Decode the whole stream and count its frames, which leave the decoder in presentation order.

    Parameters
    ----------
    opened : OpenSource
        The input.
    facts : StreamFacts
        The stream.
    store : FrameStore
        Takes the wanted frames.
    careful : bool
        Decode without frame threads, so that damage is concealed the same way each time.

    Returns
    -------
    Timeline or None
        Presentation times of the frames that exist; None if there is not one.
    """
    pts: list[int | None] = []
    dts: list[int | None] = []
    keys = array("b")
    with open_container(opened) as container:
        stream = container.streams[facts.index]
        stream.thread_type = "SLICE" if careful else "AUTO"
        decoder = Decoder(stream)
        for packet in chain(demux(container, stream), (None,)):
            for frame in decoder.feed(packet):
                store.put(len(pts), frame)
                pts.append(frame.pts)
                dts.append(frame.dts)
                keys.append(bool(frame.key_frame))
    store.damaged = decoder.damaged
    if not pts:
        return None
    ticks, _ = ticks_from_stamps(pts, dts, facts.rate, facts.time_base)
    last = facts.packets.timeline.last_duration if facts.packets else 0.0
    return Timeline(ticks, np.array(keys, dtype=np.bool_), facts.time_base, last)
