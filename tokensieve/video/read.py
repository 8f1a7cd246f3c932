"""Reading a clip: from any input to the frames that were asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from tokensieve.errors import VideoError
from tokensieve.video.clip import Clip, ClipInfo
from tokensieve.video.container import (
    StreamFacts,
    candidate_streams,
    inspect_stream,
    open_container,
)
from tokensieve.video.convert import SizeLimits
from tokensieve.video.decode import FrameStore, Outcome, Progress, fetch_by_place, fetch_by_time, plan_runs
from tokensieve.video.download import FetchLimits
from tokensieve.video.image import inspect_image, is_image, read_image
from tokensieve.video.packets import PacketIndex
from tokensieve.video.sample import SampleRequest, Sampling, Selection, select
from tokensieve.video.source import OpenSource, Source, open_source
from tokensieve.video.timeline import Timeline

logger = logging.getLogger("tokensieve")

# Files up to this size are listed completely by `probe`; larger ones are described from their header.
_PROBE_SCAN_BYTES = 256 << 20

# Decoding a damaged stream twice can differ where decoders conceal errors; then what came out last is kept.
_MOST_PASSES = 3


def read_clip(
    source: Source,
    frames: int = 32,
    sampling: Sampling = "uniform",
    *,
    fps: float | None = None,
    timestamps: Sequence[float] | None = None,
    start: float | None = None,
    end: float | None = None,
    max_frames: int | None = 1024,
    max_pixels: int | None = None,
    longest_edge: int | None = None,
    stream: int | None = None,
    progress: Progress | None = None,
    max_memory: int = 8 << 30,
    max_bytes: int = 2 << 30,
    timeout: float = 30.0,
    max_redirects: int = 5,
    allow_private: bool = False,
) -> Clip:
    """Read frames of a video, animation or image.

    Parameters
    ----------
    source : str, Path, bytes or binary file object
        Path, http(s) URL, contents of a file, or an open file.
    frames : int
        Frames to take with ``sampling="uniform"``, and most frames to take with ``"keyframe"``. A clip that
        has fewer gives all it has.
    sampling : {"uniform", "fps", "keyframe", "timestamps", "all"}
        ``uniform``: at ``linspace(0, N - 1, frames)`` cut to integers, as lmms-eval does. ``fps``: the frame
        on screen every ``1 / fps`` seconds. ``keyframe``: I-frames only, thinned evenly. ``timestamps``: the
        frame on screen at each of ``timestamps``. ``all``: every frame.
    fps : float, optional
        Frames per second to take, with ``sampling="fps"``.
    timestamps : sequence of float, optional
        Ascending times in seconds after the first frame, with ``sampling="timestamps"``.
    start, end : float, optional
        Only frames that start within [start, end), seconds after the first frame.
    max_frames : int or None
        Most frames. ``fps`` and ``keyframe`` are thinned to it; more frames asked for by number are an error.
    max_pixels, longest_edge : int, optional
        Scale frames down, proportions kept, to at most this many pixels per frame or this long a side.
    stream : int, optional
        Index of the video stream in the container (``ClipInfo.video_streams``).
    progress : callable, optional
        Called with (frames read, frames wanted) after each frame.
    max_memory : int
        Most bytes that the frames may take.
    max_bytes : int
        Largest download, or copy of a file object that cannot seek, bytes.
    timeout : float
        Seconds to wait for a server at each step.
    max_redirects : int
        Most redirects to follow.
    allow_private : bool
        Whether a URL may lead to a loopback, private or other address that is not public.

    Returns
    -------
    Clip
        At least one frame, upright RGB, with exact presentation times.

    Raises
    ------
    VideoError
        If the input cannot be read, gives no frame, exceeds a limit, or an argument makes no sense.
    """
    request = SampleRequest(sampling, frames, fps, timestamps, start, end, max_frames)
    size = SizeLimits(max_pixels, longest_edge, max_memory)
    with open_source(source, FetchLimits(max_bytes, timeout, max_redirects, allow_private)) as opened:
        if is_image(opened):
            clip = _read_image(opened, request, size, progress)
        else:
            clip = _read_video(opened, request, size, stream, progress)
    _log(clip.info)
    return clip


def probe(
    source: Source,
    *,
    stream: int | None = None,
    max_bytes: int = 2 << 30,
    timeout: float = 30.0,
    max_redirects: int = 5,
    allow_private: bool = False,
) -> ClipInfo:
    """Describe a video or image without decoding more than its first frame.

    Files up to 256 MiB are listed packet by packet, which counts frames and finds their times; larger ones
    are described from their header. A URL is downloaded.

    Parameters
    ----------
    source : str, Path, bytes or binary file object
        As for :func:`read_clip`.
    stream : int, optional
        Index of the video stream in the container.
    max_bytes, timeout, max_redirects, allow_private
        As for :func:`read_clip`.

    Returns
    -------
    ClipInfo

    Raises
    ------
    VideoError
        If the input cannot be read or gives no frame.
    """
    with open_source(source, FetchLimits(max_bytes, timeout, max_redirects, allow_private)) as opened:
        if is_image(opened):
            info = inspect_image(opened).info
        else:
            facts = _choose_stream(opened, stream, scan=opened.size <= _PROBE_SCAN_BYTES)
            info = _describe(opened, facts, facts.packets.timeline if facts.packets else None)
            if facts.packets is not None and not (facts.packets.by_time and facts.packets.complete):
                info.num_frames_kind = "estimated"
    _log(info)
    return info


def _read_image(opened: OpenSource, request: SampleRequest, size: SizeLimits, progress: Progress | None) -> Clip:
    facts = inspect_image(opened)
    selection = _select(request, facts.timeline)
    facts.info.warnings += selection.warnings
    wanted, slots = np.unique(selection.indices, return_inverse=True)
    pictures = read_image(opened, facts, wanted, size, progress)
    return Clip(
        pictures[slots] if len(slots) != len(wanted) else pictures,
        facts.timeline.times[selection.indices],
        selection.indices,
        facts.info,
        selection.span,
    )


def _read_video(
    opened: OpenSource,
    request: SampleRequest,
    size: SizeLimits,
    stream: int | None,
    progress: Progress | None,
    seek: bool = True,
) -> Clip:
    facts = _choose_stream(opened, stream, scan=True)
    packets = facts.packets
    assert packets is not None
    if packets.by_time:
        selection = _select(request, packets.timeline)
        store = FrameStore(np.unique(selection.indices), facts, size, progress)
        one_pass = plan_runs(packets, store.wanted, float("inf"))
        runs = plan_runs(packets, store.wanted) if seek else one_pass
        outcome = fetch_by_time(opened, facts, packets, store, runs)
        if outcome is Outcome.UNSEEKABLE:
            outcome = fetch_by_time(opened, facts, packets, store, one_pass)
        if outcome is Outcome.DONE:
            return _finish(opened, facts, packets.timeline, selection, store, packets.complete)
        # Room for a second set of frames is needed now.
        del store
    return _read_by_place(opened, facts, packets, request, size, progress)


def _read_by_place(
    opened: OpenSource,
    facts: StreamFacts,
    packets: PacketIndex,
    request: SampleRequest,
    size: SizeLimits,
    progress: Progress | None,
) -> Clip:
    """Decode everything and count; choose anew if the frames are not those that the packets promised."""
    timeline = packets.timeline
    for _ in range(_MOST_PASSES):
        selection = _select(request, timeline)
        store = FrameStore(np.unique(selection.indices), facts, size, progress)
        observed = fetch_by_place(opened, facts, store, careful=packets.by_time)
        if observed is None:
            raise _no_frame(opened.label)
        timeline = observed
        if store.filled.all() and np.array_equal(_select(request, timeline).indices, selection.indices):
            break
    return _finish(opened, facts, timeline, selection, store, True)


def _finish(
    opened: OpenSource,
    facts: StreamFacts,
    timeline: Timeline,
    selection: Selection,
    store: FrameStore,
    exact: bool,
) -> Clip:
    """Put a clip together from the frames that came out, and say what was wrong."""
    info = _describe(opened, facts, timeline)
    info.warnings += selection.warnings
    indices, pictures = selection.indices, store.frames
    if not store.filled.any():
        raise _no_frame(opened.label)
    if not store.filled.all():
        good = np.flatnonzero(store.filled)
        lost = len(store.filled) - len(good)
        info.warnings.append(f"{lost} of {len(store.filled)} chosen frames could not be decoded and were left out")
        pictures, indices = pictures[good], store.wanted[good]
    elif len(indices) != len(store.wanted):
        pictures = pictures[np.searchsorted(store.wanted, indices)]
    listed = len(facts.packets.timeline) if facts.packets is not None else len(timeline)
    if len(timeline) != listed:
        info.warnings.append(f"of {listed} frames in the file {len(timeline)} can be decoded and were used")
    if store.damaged:
        info.warnings.append(f"the file is damaged: packets that could not be decoded: {store.damaged}")
    if store.flawed:
        info.warnings.append(f"the file is damaged: chosen frames that may show errors: {store.flawed}")
    if store.resized:
        info.warnings.append(
            f"the picture size changes within the stream; frames scaled to the first size: {store.resized}"
        )
    return Clip(pictures, timeline.times[indices], indices.astype(np.int64), info, selection.span, exact)


def _choose_stream(opened: OpenSource, stream: int | None, scan: bool) -> StreamFacts:
    """Return the first candidate stream that gives a frame."""
    with open_container(opened) as container:
        candidates = candidate_streams(container, opened.label, stream)
    skipped: list[int] = []
    for candidate in candidates:
        with open_container(opened) as container:
            facts = inspect_stream(container, opened, candidate, scan)
        if facts is not None:
            if skipped:
                facts.warnings.append(f"video stream {skipped[0]} gives no frame; stream {candidate} was read instead")
            return facts
        skipped.append(candidate)
    raise _no_frame(opened.label)


def _describe(opened: OpenSource, facts: StreamFacts, timeline: Timeline | None) -> ClipInfo:
    """Fill a ClipInfo from the header and, if known, the times of all frames."""
    width, height = facts.orientation.size(facts.width, facts.height)
    rate = float(facts.rate) if facts.rate else None
    info = ClipInfo(
        label=opened.label,
        width=width,
        height=height,
        rotation=facts.orientation.rotation,
        mirrored=facts.orientation.mirrored,
        average_fps=rate,
        codec=facts.codec,
        container=facts.container,
        pix_fmt=facts.pix_fmt,
        time_base=facts.time_base,
        stream_index=facts.index,
        video_streams=facts.all_video,
        warnings=list(facts.warnings),
    )
    if timeline is None:
        estimate = facts.header_frames or round(facts.header_duration * (rate or 0.0))
        info.duration, info.start_time = facts.header_duration, facts.header_start
        info.num_frames, info.num_frames_kind = (estimate, "estimated") if estimate else (None, None)
        return info
    info.duration, info.start_time = timeline.duration, timeline.start_time
    info.num_frames, info.num_frames_kind = len(timeline), "exact"
    info.variable_frame_rate = timeline.variable_rate
    if not rate and len(timeline) > 1 and timeline.duration:
        info.average_fps = len(timeline) / timeline.duration
    if facts.container == "gif" and len(timeline) == 1:
        info.is_image, info.average_fps, info.duration = True, None, 0.0
    return info


def _select(request: SampleRequest, timeline: Timeline) -> Selection:
    return select(request, timeline.times, timeline.keys, timeline.duration, float(timeline.time_base))


def _no_frame(label: str) -> VideoError:
    return VideoError(
        f"{label} gives no frame that can be decoded (damaged, encrypted or of an unknown codec); "
        "check that a player shows it."
    )


def _log(info: ClipInfo) -> None:
    for warning in info.warnings:
        logger.warning("%s: %s", info.label, warning)
