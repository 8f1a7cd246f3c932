"""Video input: from a file, URL or bytes to frames with exact presentation times."""

from tokensieve.video.clip import Clip, ClipInfo
from tokensieve.video.download import FetchLimits
from tokensieve.video.read import probe, read_clip
from tokensieve.video.sample import (
    Sampling,
    fps_indices,
    keyframe_indices,
    timestamp_indices,
    uniform_indices,
)
from tokensieve.video.source import OpenSource, Source, open_source

__all__ = [
    "Clip",
    "ClipInfo",
    "FetchLimits",
    "OpenSource",
    "Sampling",
    "Source",
    "fps_indices",
    "keyframe_indices",
    "open_source",
    "probe",
    "read_clip",
    "timestamp_indices",
    "uniform_indices",
]
