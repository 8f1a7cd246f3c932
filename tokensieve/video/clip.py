"""What reading a video gives: the frames, when each is shown, and what is known about the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

# Matroska stores milliseconds, so an even frame rate shows up there with an error of up to one of them.
_EVEN_RATE_TOLERANCE = 1e-3


@dataclass
class ClipInfo:
    """Facts about one video or image file.

    Attributes
    ----------
    label : str
        Path, shortened URL, or a description of the bytes or file object that was given.
    width, height : int
        Size of a frame in pixels after rotation and before any down-scaling.
    rotation : int
        Counter-clockwise rotation that was applied for display: 0, 90, 180 or 270 degrees.
    mirrored : bool
        Whether the display matrix (or Exif orientation) also asks for a mirror image; it was applied before
        ``rotation``.
    average_fps : float or None
        Average frame rate of the stream in frames per second, None for a still image.
    duration : float
        Seconds from the first presented frame to the end of the last one; 0 for a still image.
    start_time : float
        Presentation time of the first frame on the clock of the file, seconds.
    num_frames : int or None
        Number of frames, as far as known.
    num_frames_kind : {"exact", "estimated"} or None
        Whether ``num_frames`` was counted or taken from header, duration and rate.
    codec, container, pix_fmt : str
        Names as FFmpeg gives them (for images, as Pillow does).
    is_image : bool
        True for a still image, which is read as a clip of one frame.
    variable_frame_rate : bool or None
        Whether frame intervals differ by more than 3 ms; None if the intervals were not looked at.
    time_base : Fraction
        Length of one tick of the presentation times, seconds.
    stream_index : int
        Index in the container of the stream that was read.
    video_streams : tuple of int
        Indices of all video streams of the container.
    warnings : list of str
        What was odd about the file or the request; each was also logged.
    """

    label: str
    width: int
    height: int
    rotation: int = 0
    mirrored: bool = False
    average_fps: float | None = None
    duration: float = 0.0
    start_time: float = 0.0
    num_frames: int | None = None
    num_frames_kind: Literal["exact", "estimated"] | None = None
    codec: str = ""
    container: str = ""
    pix_fmt: str = ""
    is_image: bool = False
    variable_frame_rate: bool | None = None
    time_base: Fraction = Fraction(1, 1000)
    stream_index: int = 0
    video_streams: tuple[int, ...] = (0,)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Clip:
    """Frames of a video with their exact times.

    Attributes
    ----------
    frames : ndarray [T, H, W, 3], uint8
        RGB pictures, upright, in presentation order.
    timestamps : ndarray [T], float64
        Presentation times in seconds after the first presented frame of the stream.
    indices : ndarray [T], int64
        Place of each frame in the presentation order of the stream, counted from 0.
    info : ClipInfo
        What is known about the file.
    span : float
        Seconds of video that the frames stand for: the range that was sampled, or the number of frames
        times their spacing when single times were asked for.
    indices_exact : bool
        True if ``indices`` were counted; False if damage in parts that were not decoded may shift them.
    """

    frames: NDArray[np.uint8]
    timestamps: NDArray[np.float64]
    indices: NDArray[np.int64]
    info: ClipInfo
    span: float
    indices_exact: bool = True

    def __post_init__(self) -> None:
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], not {self.frames.dtype} {list(self.frames.shape)}")
        if not len(self.frames) == len(self.timestamps) == len(self.indices):
            raise ValueError(
                f"a clip needs one timestamp and one index per frame, not {len(self.timestamps)} and "
                f"{len(self.indices)} for {len(self.frames)} frames"
            )

    def __len__(self) -> int:
        """Return the number of frames T."""
        return len(self.frames)

    @property
    def start_time(self) -> float:
        """Time of the first presented frame on the clock of the file; ``timestamps`` count from it."""
        return self.info.start_time

    def video_metadata(self) -> VideoMetadata:
        """Describe the clip the way Hugging Face video processors want it.

        Pass it as ``video_metadata=[clip.video_metadata()]`` together with ``do_sample_frames=False``.
        Processors compute the time of a frame as ``frames_indices / fps`` (Qwen3-VL and most others) and the
        sampling rate as ``T / total_num_frames * fps`` (Qwen2.5-VL). With an even frame rate the numbers are
        the real indices and the real rate. With a variable rate no rate fits, so the indices count ticks of
        the stream's clock and ``fps`` is the number of ticks per second; the quotient is then the exact time.

        Returns
        -------
        transformers.video_utils.VideoMetadata
            A fresh object on each call, because processors write into it.
        """
        from transformers.video_utils import VideoMetadata

        fps, indices = self._frame_clock()
        return VideoMetadata(
            total_num_frames=max(round(self.span * fps), 1),
            fps=fps,
            width=self.info.width,
            height=self.info.height,
            duration=self.info.duration,
            video_backend="pyav",
            frames_indices=indices,
        )

    def _frame_clock(self) -> tuple[float, list[int]]:
        """Choose a rate and integer positions with ``position / rate == timestamp``."""
        if self.info.is_image:
            return 1.0, [0] * len(self)
        if not self.info.variable_frame_rate:
            tolerance = min(float(self.info.time_base), _EVEN_RATE_TOLERANCE) + 1e-6
            for rate in self._rates():
                if np.abs(self.indices / rate - self.timestamps).max() <= tolerance:
                    return rate, self.indices.tolist()
        ticks_per_second = 1.0 / self.info.time_base
        return float(ticks_per_second), np.rint(self.timestamps * float(ticks_per_second)).astype(int).tolist()

    def _rates(self) -> list[float]:
        """Even rates to try: the one the container states, then the one the frames show."""
        rates = [self.info.average_fps] if self.info.average_fps else []
        if self.timestamps[-1] > 0:
            rates.append(float(self.indices[-1] / self.timestamps[-1]))
        return [rate for rate in rates if rate > 0]
