"""The numbers that Hugging Face processors compute from a clip equal its presentation times."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import make_batched_metadata
from video_media import encode, sequence

from tokensieve.video import Clip, ClipInfo, read_clip

MILLISECOND = Fraction(1, 1000)


def clip_of(times: list[float], indices: list[int], span: float, **facts: object) -> Clip:
    info = ClipInfo("made", 4, 4, **facts)  # type: ignore[arg-type]
    frames = np.zeros((len(times), 4, 4, 3), dtype=np.uint8)
    return Clip(frames, np.array(times), np.array(indices), info, span)


def grid_seconds(clip: Clip) -> float:
    """Seconds per temporal patch as the Qwen2.5-VL processor computes them."""
    return 2 / clip.video_metadata().sampled_fps


@pytest.mark.parametrize("uneven", [False, True])
def test_qwen3_vl_times(uneven: bool) -> None:
    ticks = [100 * place + 37 * uneven * (place % 3) for place in range(30)]
    clip = read_clip(encode(sequence(30), ticks=ticks, time_base=MILLISECOND), 9)
    metadata = clip.video_metadata()
    computed = Qwen3VLProcessor._calculate_timestamps(None, metadata.frames_indices, metadata.fps, 2)
    padded = np.append(clip.timestamps, clip.timestamps[-1]).reshape(-1, 2)
    np.testing.assert_allclose(computed, padded.mean(axis=1), atol=1e-6)
    # The processor appends to the list it is given, which must not reach the clip.
    assert len(clip.video_metadata().frames_indices) == 9


def test_qwen2_5_vl_times_of_uniform_and_partial_reads() -> None:
    data = encode(sequence(40), rate=10)
    assert grid_seconds(read_clip(data, 8)) == pytest.approx(2 * 4.0 / 8)
    assert grid_seconds(read_clip(data, 8, start=2.0, end=3.6)) == pytest.approx(2 * 1.6 / 8)
    assert grid_seconds(read_clip(data, sampling="fps", fps=2.5)) == pytest.approx(2 / 2.5, rel=0.02)
    assert grid_seconds(read_clip(data, sampling="timestamps", timestamps=[1.0, 2.0, 3.0])) == pytest.approx(2.0)


def test_even_rate_keeps_real_indices() -> None:
    metadata = clip_of([0.0, 0.033, 0.067], [0, 1, 2], 0.1, average_fps=30.0).video_metadata()
    assert (metadata.fps, metadata.frames_indices, metadata.total_num_frames) == (30.0, [0, 1, 2], 3)
    assert metadata.video_backend == "pyav"


def test_wrong_stated_rate_is_replaced_by_the_real_one() -> None:
    times = [0.0, 10.0, 20.0]
    metadata = clip_of(times, [0, 300, 600], 20.0, average_fps=29.0).video_metadata()
    assert metadata.fps == pytest.approx(30.0)
    assert metadata.timestamps == pytest.approx(times)


def test_uneven_rate_counts_ticks() -> None:
    facts = {"average_fps": 10.0, "variable_frame_rate": True, "time_base": Fraction(1, 90000)}
    metadata = clip_of([0.0, 0.3, 0.31111], [0, 1, 2], 0.5, **facts).video_metadata()
    assert metadata.fps == 90000
    assert metadata.timestamps == pytest.approx([0.0, 0.3, 0.31111], abs=6e-6)
    assert metadata.sampled_fps == pytest.approx(6.0)


def test_ntsc_time_base() -> None:
    facts = {"variable_frame_rate": True, "time_base": Fraction(1001, 24000)}
    times = [0.0, 3 * 1001 / 24000, 4 * 1001 / 24000]
    metadata = clip_of(times, [0, 1, 2], 0.2, **facts).video_metadata()
    assert metadata.frames_indices == [0, 3, 4]
    assert metadata.timestamps == pytest.approx(times)


def test_processors_accept_the_metadata() -> None:
    clip = read_clip(encode(sequence(8)), 4)
    batched = make_batched_metadata([clip.frames], [clip.video_metadata()])
    assert batched[0].frames_indices == clip.indices.tolist()


def test_malformed_clips_are_refused() -> None:
    info = ClipInfo("made", 4, 4)
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\]"):
        Clip(np.zeros((1, 4, 4), np.uint8), np.zeros(1), np.zeros(1, int), info, 1.0)
    with pytest.raises(ValueError, match="one timestamp and one index"):
        Clip(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(1), np.zeros(2, int), info, 1.0)
