"""The samplers are pure functions from times to indices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokensieve.errors import VideoError
from tokensieve.video.sample import (
    SampleRequest,
    Selection,
    fps_indices,
    keyframe_indices,
    select,
    thin,
    timestamp_indices,
    uniform_indices,
)

TIMES = np.arange(100) / 10
KEYS = np.arange(100) % 20 == 0


def choose(**wish: object) -> Selection:
    return select(SampleRequest(**wish), TIMES, KEYS, 10.0, 1e-3)  # type: ignore[arg-type]


def test_uniform_follows_lmms_eval() -> None:
    assert uniform_indices(100, 8).tolist() == [0, 14, 28, 42, 56, 70, 84, 99]
    assert uniform_indices(100, 1).tolist() == [0]
    assert uniform_indices(3, 8).tolist() == [0, 1, 2]


@given(st.integers(1, 5000), st.integers(1, 300))
def test_uniform_is_distinct_and_has_both_ends(total: int, count: int) -> None:
    indices = uniform_indices(total, count)
    assert len(indices) == min(total, count)
    assert np.all(np.diff(indices) > 0)
    assert indices[0] == 0
    assert count == 1 or indices[-1] == total - 1


def test_fps_takes_the_frame_on_screen() -> None:
    assert fps_indices(TIMES, 1, 0.0, 10.0).tolist() == list(range(0, 100, 10))
    assert fps_indices(TIMES, 3, 0.0, 2.0).tolist() == [0, 3, 6, 10, 13, 16]
    assert fps_indices(TIMES, 1e9, 0.0, 10.0).tolist() == list(range(100))
    gap = np.array([0.0, 0.1, 5.0, 5.1])
    assert fps_indices(gap, 1, 0.0, 5.2).tolist() == [0, 1, 2]


@given(
    st.lists(st.floats(0.001, 3.0), min_size=0, max_size=60),
    st.floats(0.1, 40.0),
)
def test_fps_equals_looking_up_every_grid_time(steps: list[float], fps: float) -> None:
    times = np.concatenate(([0.0], np.cumsum(steps)))
    stop = float(times[-1]) + 0.05
    grid = np.arange(int(np.ceil(stop * fps)) + 1) / fps
    grid = grid[grid < stop - 1e-9]
    near_a_frame = np.abs(grid[:, None] - times[None]).min(axis=1) < 2e-6
    surely = set(timestamp_indices(times, grid[~near_a_frame].tolist()).tolist()) if (~near_a_frame).any() else set()
    taken = set(fps_indices(times, fps, 0.0, stop).tolist())
    assert surely <= taken
    assert 0 in taken
    perhaps = surely | {int(np.abs(times - time).argmin()) + shift for time in grid[near_a_frame] for shift in (-1, 0)}
    assert taken <= perhaps


def test_millisecond_stamps_do_not_shift_the_grid() -> None:
    """Matroska rounds 2/3 s to 0.667 s, which still is the frame due at 2/3 s."""
    times = np.round(np.arange(90) / 30, 3)
    chosen = select(SampleRequest("fps", fps=3), times, times == 0, 3.0, 1e-3)
    assert chosen.indices.tolist() == list(range(0, 90, 10))


def test_keyframes_are_thinned_evenly() -> None:
    assert keyframe_indices(KEYS, 8).tolist() == [0, 20, 40, 60, 80]
    assert keyframe_indices(KEYS, 3).tolist() == [0, 40, 80]


def test_no_keyframe_in_range_takes_the_one_before() -> None:
    chosen = choose(sampling="keyframe", start=2.5, end=3.5)
    assert chosen.indices.tolist() == [20]
    assert "no keyframe" in chosen.warnings[0]


def test_timestamps_take_the_last_frame_at_or_before() -> None:
    chosen = choose(sampling="timestamps", timestamps=[0.0, 0.19, 0.2, 9.95])
    assert chosen.indices.tolist() == [0, 1, 2, 99]
    assert not chosen.warnings
    assert choose(sampling="timestamps", timestamps=TIMES).indices.tolist() == list(range(100))


def test_timestamps_outside_are_clamped_with_a_warning() -> None:
    chosen = choose(sampling="timestamps", timestamps=[-1.0, 5.0, 99.0])
    assert chosen.indices.tolist() == [0, 50, 99]
    assert "2 of 3" in chosen.warnings[0]


def test_range_is_half_open() -> None:
    assert choose(sampling="all", start=1.0, end=1.5).indices.tolist() == [10, 11, 12, 13, 14]
    assert choose(frames=2, start=1.0, end=1.5).indices.tolist() == [10, 14]
    assert choose(sampling="all", start=1.01, end=1.05).indices.tolist() == [10]
    assert choose(sampling="all", start=9.95).indices.tolist() == [99]
    assert choose(sampling="fps", fps=1, start=2.5, end=5.0).indices.tolist() == [25, 35, 45]


def test_span_is_what_the_frames_stand_for() -> None:
    assert choose(frames=4).span == 10.0
    assert choose(frames=4, start=2.0, end=6.0).span == 4.0
    assert choose(sampling="fps", fps=0.4).span == pytest.approx(10.0)
    assert choose(sampling="timestamps", timestamps=[3.0, 4.0, 5.0]).span == pytest.approx(3.0)


def test_limits() -> None:
    thinned = choose(sampling="fps", fps=10, max_frames=5)
    assert thinned.indices.tolist() == [0, 24, 49, 74, 99]
    assert "thinned" in thinned.warnings[0]
    assert len(choose(sampling="keyframe", max_frames=2).indices) == 2
    for wish in (
        {"sampling": "all"},
        {"frames": 50},
        {"sampling": "timestamps", "timestamps": list(TIMES[:11])},
    ):
        with pytest.raises(VideoError, match="max_frames=10"):
            choose(max_frames=10, **wish)
    assert thin(np.arange(10), 3).tolist() == [0, 4, 9]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"frames": 0}, "frames must be a whole number above 0, not 0"),
        ({"frames": -3}, "not -3"),
        ({"frames": 2.5}, "not 2.5"),
        ({"frames": True}, "not True"),
        ({"frames": "8"}, "not '8'"),
        ({"max_frames": 0}, "max_frames"),
        ({"sampling": "random"}, "'random' is unknown"),
        ({"sampling": "fps"}, "needs the number of frames per second"),
        ({"sampling": "fps", "fps": 0}, "above 0"),
        ({"sampling": "fps", "fps": float("nan")}, "finite"),
        ({"fps": 2}, "no use with sampling='uniform'"),
        ({"timestamps": [1.0]}, "no use with sampling='uniform'"),
        ({"sampling": "timestamps"}, "needs the times"),
        ({"sampling": "timestamps", "timestamps": []}, "empty"),
        ({"sampling": "timestamps", "timestamps": [1.0, float("inf")]}, "finite"),
        ({"sampling": "timestamps", "timestamps": [2.0, 1.0]}, "must ascend"),
        ({"sampling": "timestamps", "timestamps": ["a"]}, "must be a number"),
        ({"sampling": "timestamps", "timestamps": "12"}, "list of seconds"),
        ({"sampling": "timestamps", "timestamps": 3.0}, "list of seconds"),
        ({"sampling": "timestamps", "timestamps": [1.0], "start": 0.5}, "no use"),
        ({"start": -1}, "0 or more"),
        ({"start": 3, "end": 3}, "after start"),
        ({"end": 0}, "after start"),
        ({"start": "x"}, "number"),
        ({"start": 10.5}, "after the end of the clip"),
    ],
)
def test_senseless_wishes(wish: dict[str, object], message: str) -> None:
    with pytest.raises(VideoError, match=message):
        choose(**wish)
