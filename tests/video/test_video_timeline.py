"""Presentation times, and their repair where a stream has them wrong or not at all."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokensieve.video.timeline import Timeline, repair_ticks, ticks_from_stamps

MILLISECOND = Fraction(1, 1000)


def timeline(ticks: list[int], base: Fraction = MILLISECOND) -> Timeline:
    return Timeline(np.array(ticks), np.zeros(len(ticks), dtype=bool), base, 0.04)


def test_times_start_at_zero_and_keep_the_file_clock() -> None:
    line = timeline([1000, 1040, 1080])
    assert line.times.tolist() == [0.0, 0.04, 0.08]
    assert line.start_time == 1.0
    assert line.duration == pytest.approx(0.12)
    assert not line.variable_rate
    assert timeline([-300, -200, 900]).start_time == -0.3


def test_rounding_is_no_variable_rate_but_a_gap_is() -> None:
    assert not timeline([0, 33, 67, 100]).variable_rate
    assert timeline([0, 33, 67, 200]).variable_rate
    assert not timeline([0, 500]).variable_rate


def test_one_frame_lasts_as_its_packet_says() -> None:
    assert timeline([7]).duration == 0.04


def test_ntsc_times_are_correctly_rounded() -> None:
    line = timeline([0, 1001, 30030], Fraction(1, 30000))
    assert line.times.tolist() == [0.0, 1001 / 30000, 30030 / 30000]


def test_stamps_of_packed_b_frames_are_sorted() -> None:
    assert repair_ticks([1, 2, 4, 3, 5, 7, 6], Fraction(1, 25)).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_joined_recordings_continue() -> None:
    stamps = [5000, 5040, 5080, 5120, 0, 40, 80]
    assert repair_ticks(stamps, MILLISECOND).tolist() == [5000, 5040, 5080, 5120, 5160, 5200, 5240]


def test_equal_stamps_are_pushed_apart() -> None:
    assert repair_ticks([0, 0, 0, 40], MILLISECOND).tolist() == [0, 1, 2, 40]


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=80))
def test_repaired_stamps_always_ascend(stamps: list[int]) -> None:
    repaired = repair_ticks(stamps, MILLISECOND)
    assert len(repaired) == len(stamps)
    assert np.all(np.diff(repaired) > 0)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50, unique=True))
def test_good_stamps_are_kept(stamps: list[int]) -> None:
    ascending = sorted(stamps)
    assert repair_ticks(ascending, MILLISECOND).tolist() == ascending


def test_missing_stamps_fall_back_to_decoding_times_then_to_the_rate() -> None:
    ticks, assumed = ticks_from_stamps([0, None, 80], [0, 40, 80], Fraction(25), MILLISECOND)
    assert (ticks.tolist(), assumed) == ([0, 40, 80], False)
    ticks, assumed = ticks_from_stamps([None, None, None], [0, None, 80], Fraction(10), MILLISECOND)
    assert (ticks.tolist(), assumed) == ([0, 100, 200], True)
    ticks, assumed = ticks_from_stamps([None, None], [None, None], None, MILLISECOND)
    assert (ticks.tolist(), assumed) == ([0, 40], True)
