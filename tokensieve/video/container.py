"""Opening a container, choosing its video stream, and listing its frames without decoding them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av

from tokensieve.errors import VideoError
from tokensieve.video.convert import MAX_FRAME_PIXELS, Orientation, orientation_of
from tokensieve.video.packets import MAX_PACKETS, PacketIndex, PacketListing
from tokensieve.video.source import OpenSource
from tokensieve.video.timeline import FALLBACK_RATE

# Containers that hold moving pictures themselves, and sound files, which can at least be named as such. Play
# lists, scripts and image sequences (hls, dash, concat, image2, sdp ...) are left out on purpose: they make
# the demuxer open other files and addresses.
_FORMATS = (
    "3g2,3gp,amv,apng,asf,av1,avi,avs2,avs3,cavsvideo,dhav,dirac,dnxhd,dv,dxa,evc,flic,flv,gif,gxf,h261,h263,"
    "h264,hevc,ifv,iv8,ivf,ivr,kux,live_flv,lvf,m4a,m4v,matroska,mj2,mjpeg,mov,mp4,mpeg,mpegts,mpegvideo,mtv,"
    "mv,mvi,mxf,nsv,nut,nuv,obu,ogg,pva,rm,roq,smjpeg,smk,swf,thp,ty,vc1,vc1test,vivo,vvc,webm,wtv,"
    "yuv4mpegpipe,aac,ac3,aiff,amr,au,caf,flac,mp3,w64,wav"
)

# Decoders that are not named after the codec they decode.
_CODEC_NAMES = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}
_GIF_TRAILER = b";"
_ATTACHED_PICTURE = 0x400
_DEFAULT = 0x1
_STILL_CODECS = frozenset({"mjpeg", "png", "bmp", "tiff", "webp", "gif"})


@dataclass
class StreamFacts:
    """What one look at a stream tells: header fields, list of packets, and its first decoded frame."""

    index: int
    all_video: tuple[int, ...]
    container: str
    codec: str
    pix_fmt: str
    width: int
    height: int
    orientation: Orientation
    rate: Fraction | None
    time_base: Fraction
    header_frames: int
    header_duration: float
    header_start: float
    packets: PacketIndex | None
    warnings: list[str] = field(default_factory=list)


class Decoder:
    """A stream's decoder that survives damaged packets and counts them.

    Attributes
    ----------
    damaged : int
        Packets that could not be decoded so far.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.damaged = 0

    def feed(self, packet: Any) -> list[Any]:
        """Decode a packet, or with None empty the decoder; a damaged packet gives no frame."""
        try:
            return list(self.stream.decode(packet))
        except (av.error.FFmpegError, ValueError, EOFError):
            self.damaged += packet is not None
            return []


@contextmanager
def open_container(opened: OpenSource) -> Iterator[Any]:
    """Open an input with PyAV; nothing but the input itself can be read through it.

    Raises
    ------
    VideoError
        If it is not a video that FFmpeg knows.
    """
    target = opened.rewound()
    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": "file" if isinstance(target, str) else "none",
    }
    try:
        container = av.open(target, mode="r", container_options=options, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        text = "it looks like text" if _looks_like_text(opened.head) else error_text(error)
        raise VideoError(
            f"{opened.label} cannot be read as a video or image ({text}); check that it is one and is complete."
        ) from error
    try:
        yield container
    finally:
        container.close()


def error_text(error: BaseException) -> str:
    """Return what FFmpeg says about an error, without its number and file name."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__).strip()


def candidate_streams(container: Any, label: str, wanted: int | None) -> list[int]:
    """Order the video streams by how likely they are what the author of the file wants shown.

    Moving pictures come before stills (a phone's motion photo holds both), streams marked as default before
    others, then the order of the container. Attached pictures (cover art) come last.

    Parameters
    ----------
    container : av.container.InputContainer
        Open container.
    label : str
        Name for messages.
    wanted : int, optional
        Index of the stream in the container, if the caller chose one.

    Returns
    -------
    list of int
        Stream indices, best first.

    Raises
    ------
    VideoError
        If there is no video stream, or the wanted one is none.
    """
    streams = list(container.streams.video)
    if not streams:
        kinds = sorted({str(stream.type) for stream in container.streams})
        raise VideoError(
            f"{label} has no video stream, only {' and '.join(kinds) or 'nothing'}; give a video or image."
        )
    if wanted is not None:
        if wanted not in [stream.index for stream in streams]:
            indices = ", ".join(str(stream.index) for stream in streams)
            raise VideoError(f"stream {wanted} of {label} is no video stream; its video streams are {indices}.")
        return [int(wanted)]

    def rank(stream: Any) -> tuple[bool, bool, bool]:
        # An enumeration that is an integer from PyAV 16 on, and only holds one before.
        disposition = getattr(stream, "disposition", _DEFAULT)
        flags = int(getattr(disposition, "value", disposition))
        cover = bool(flags & _ATTACHED_PICTURE)
        if not hasattr(stream, "disposition"):
            cover = stream.codec_context.name in _STILL_CODECS and container.format.name != "gif"
        return cover, stream.frames == 1, not flags & _DEFAULT

    return [int(stream.index) for stream in sorted(streams, key=rank)]


def inspect_stream(container: Any, opened: OpenSource, stream_index: int, scan: bool = True) -> StreamFacts | None:
    """List the packets of a stream and decode its first frame.

    Parameters
    ----------
    container : av.container.InputContainer
        Freshly opened container.
    opened : OpenSource
        The input that it was opened from.
    stream_index : int
        Index of the stream in the container.
    scan : bool
        Whether to list all packets; otherwise reading stops after the first frame.

    Returns
    -------
    StreamFacts or None
        None if no frame can be decoded.

    Raises
    ------
    VideoError
        If the stream is encrypted, its frames or their number are too large.
    """
    stream = container.streams[stream_index]
    codec = stream.codec_context
    if codec is None:
        return None
    if codec.width * codec.height > MAX_FRAME_PIXELS:
        raise VideoError(
            f"{opened.label} has frames of {codec.width}x{codec.height} pixels, which is too large; scale it down."
        )
    warnings: list[str] = []
    listing = PacketListing()
    first = _walk(container, stream, listing, scan, opened.label, warnings)
    if first is None:
        return None
    orientation, problem = orientation_of(first)
    warnings += [problem] if problem else []
    rate = Fraction(stream.average_rate or stream.guessed_rate or 0) or None
    facts = StreamFacts(
        index=stream_index,
        all_video=tuple(int(other.index) for other in container.streams.video),
        container=container.format.name,
        codec=_CODEC_NAMES.get(codec.name, codec.name),
        pix_fmt=first.format.name,
        width=first.width,
        height=first.height,
        orientation=orientation,
        rate=rate,
        time_base=Fraction(stream.time_base),
        header_frames=int(stream.frames),
        header_duration=_header_duration(container, stream),
        header_start=float((first.pts or 0) * Fraction(stream.time_base)),
        packets=None,
        warnings=warnings,
    )
    if scan:
        facts.packets = listing.finished(facts.container, facts.rate, facts.time_base)
        warnings += _doubts(container, opened, facts, listing)
    return facts


def _walk(container: Any, stream: Any, listing: PacketListing, scan: bool, label: str, warnings: list[str]) -> Any:
    """Demux a stream into ``listing``; decode only until the first frame comes out, and return that frame."""
    first = None
    decoder = Decoder(stream)
    # Where no frame count is stated, sound tells whether the file was cut off or its pictures just end early.
    others = () if stream.frames else container.streams.audio
    try:
        for packet in read_packets(container, stream, *others):
            if packet.pts is not None:
                listing.latest[packet.time_base] = max(packet.pts, listing.latest.get(packet.time_base, packet.pts))
            if packet.stream_index != stream.index:
                continue
            listing.add(packet)
            if len(listing.pts) > MAX_PACKETS:
                raise VideoError(f"{label} has more than {MAX_PACKETS} frames; cut it into parts.")
            if len(listing.pts) == 1 and _is_encrypted(packet):
                raise VideoError(f"{label} is encrypted (DRM); give a file without copy protection.")
            if first is None:
                first = next(iter(decoder.feed(packet)), None)
            if first is not None and not scan:
                break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        listing.complete = False
        warnings.append(f"the file is damaged: reading stopped early ({error_text(error)})")
    if first is None:
        first = next(iter(decoder.feed(None)), None)
    return first


def _doubts(container: Any, opened: OpenSource, facts: StreamFacts, listing: PacketListing) -> list[str]:
    """Warnings about what the list of packets shows to be missing or made up."""
    doubts = []
    if facts.packets is not None and facts.packets.assumed_rate:
        assumed = float(facts.rate or FALLBACK_RATE)
        doubts.append(f"the stream has no time stamps; {assumed:g} frames per second were assumed")
    found = len(listing.pts)
    if facts.header_frames - found > max(2, 0.02 * facts.header_frames):
        doubts.append(f"the header states {facts.header_frames} frames, but {found} are in the file")
    if "matroska" in facts.container and container.duration:
        stated = container.duration / av.time_base
        present = max((float(pts * base) for base, pts in listing.latest.items()), default=0.0)
        if stated - present > max(0.5, 0.05 * stated):
            doubts.append(f"the header states {stated:g} s, but the file ends after {present:g} s")
    if facts.container == "gif" and not opened.tail.rstrip(b"\0").endswith(_GIF_TRAILER):
        doubts.append("the file is damaged: its end is missing")
    if listing.corrupt:
        doubts.append(f"the file is damaged: incomplete packets: {listing.corrupt}")
    return doubts


def _is_encrypted(packet: Any) -> bool:
    """Whether a packet carries a key reference; older PyAV cannot tell, and decoding fails there instead."""
    return bool(hasattr(packet, "has_sidedata") and packet.has_sidedata("encryption_info"))


def read_packets(container: Any, *streams: Any) -> Iterator[Any]:
    """Yield the packets of some streams in storage order, without the empty ones PyAV adds at the end.

    A stream that turns up in the middle of a broadcast recording makes PyAV fail with an IndexError when it comes
    to those empty packets, after all real ones.
    """
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except IndexError:
            return
        if packet is None:
            return
        if packet.size:
            yield packet


def _header_duration(container: Any, stream: Any) -> float:
    if stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(container.duration or 0) / av.time_base


def _looks_like_text(head: bytes) -> bool:
    return all((byte >= 32 and byte != 127) or byte in b"\t\r\n" for byte in head)
