"""The packets of a video stream: which frames there are, when each is shown and where it is stored."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokensieve.video.timeline import Timeline, ticks_from_stamps

# Containers whose packets carry no presentation times of their own, so a frame is known only by its place.
_NO_PRESENTATION_TIMES = (
    "avi,av1,avs2,avs3,cavsvideo,dirac,dnxhd,evc,h261,h263,h264,hevc,m4v,mjpeg,mpegvideo,obu,vc1,vvc"
)

# A frame is shown at most this many places away from where it is stored (decoders hold 16 pictures).
_LONGEST_REORDERING = 64

# A day of 60 frames per second; a longer list of frames is a damaged or hostile file.
MAX_PACKETS = 24 * 3600 * 60


@dataclass
class PacketIndex:
    """Every packet of a stream in storage order.

    Attributes
    ----------
    pts : ndarray [P], int64
        Presentation times in ticks; meaningless where ``by_time`` is False.
    dts : ndarray [P], int64
        Decoding times in ticks, equal to ``pts`` where unknown.
    keys : ndarray [P], bool
        Which packets are keyframes.
    shown : ndarray [N], int64
        Storage position of each frame in presentation order; packets that an edit list hides are left out.
    timeline : Timeline
        Presentation times of the N frames.
    by_time : bool
        Whether a decoded frame can be recognised by its time stamp. If not, only its place counts.
    complete : bool
        Whether the whole stream was listed without a read error.
    assumed_rate : bool
        Whether the times were made up from a frame rate.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    keys: NDArray[np.bool_]
    shown: NDArray[np.int64]
    timeline: Timeline
    by_time: bool
    complete: bool
    assumed_rate: bool = False

    def index_of(self, pts: int | None) -> int | None:
        """Return the index in presentation order of the frame with this time stamp, None if there is none."""
        ticks = self.timeline.ticks
        if pts is None:
            return None
        index = int(np.searchsorted(ticks, pts))
        return index if index < len(ticks) and ticks[index] == pts else None


class PacketListing:
    """Packet fields collected in compact arrays: an hour of video is a few megabytes."""

    def __init__(self) -> None:
        self.pts, self.dts = array("q"), array("q")
        self.has_pts, self.has_dts = array("b"), array("b")
        self.keys, self.hidden = array("b"), array("b")
        self.duration = 0
        self.corrupt = 0
        self.latest: dict[Fraction, int] = {}
        self.complete = True

    def add(self, packet: Any) -> None:
        """Append one packet."""
        self.pts.append(0 if packet.pts is None else packet.pts)
        self.dts.append(0 if packet.dts is None else packet.dts)
        self.has_pts.append(packet.pts is not None)
        self.has_dts.append(packet.dts is not None)
        self.keys.append(bool(packet.is_keyframe))
        self.hidden.append(bool(packet.is_discard))
        self.duration = packet.duration or self.duration
        self.corrupt += bool(packet.is_corrupt)

    def finished(self, container: str, rate: Fraction | None, time_base: Fraction) -> PacketIndex:
        """Sort the packets into presentation order, by their times if these can be trusted."""
        pts = np.array(self.pts, dtype=np.int64)
        keys = np.array(self.keys, dtype=np.bool_)
        has_pts, has_dts = np.array(self.has_pts, dtype=np.bool_), np.array(self.has_dts, dtype=np.bool_)
        dts = np.where(has_dts, np.array(self.dts, dtype=np.int64), pts)
        visible = np.flatnonzero(np.array(self.hidden) == 0)
        if not len(visible):
            visible = np.arange(len(pts))
        order = np.argsort(pts[visible], kind="stable")
        shown = visible[order]
        by_time = (
            not set(_NO_PRESENTATION_TIMES.split(",")) & set(container.split(","))
            and bool(has_pts[visible].all())
            and bool((np.diff(pts[shown]) > 0).all())
            and bool((np.abs(order - np.arange(len(order))) <= _LONGEST_REORDERING).all())
        )
        assumed = False
        if by_time:
            ticks = pts[shown]
        else:
            shown = visible
            known_pts = [int(stamp) if known else None for stamp, known in zip(pts, has_pts, strict=True)]
            known_dts = [int(stamp) if known else None for stamp, known in zip(dts, has_dts, strict=True)]
            ticks, assumed = ticks_from_stamps(
                [known_pts[place] for place in shown],
                [known_dts[place] for place in shown],
                rate,
                time_base,
            )
        last = float(self.duration * time_base) or (float(1 / rate) if rate else 0.0)
        timeline = Timeline(ticks, keys[shown], time_base, last)
        return PacketIndex(pts, dts, keys, shown, timeline, by_time, self.complete, assumed)
