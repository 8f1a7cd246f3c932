"""Charts: what they show, and how they are drawn as SVG."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from view_items import Page, data, frames, item, merge_map

from tokensieve.view.cells import states
from tokensieve.view.charts import bar_rows, frame_chart
from tokensieve.view.frame_charts import budget_chart, frame_uniqueness, uniqueness_chart
from tokensieve.view.quantities import Measure, claim, even_choice, measures, requests, token_rows

REPORT = {
    "requested": [{"method": "vidcom2", "retention": 0.25, "counted": "patches that enter the LLM", "dropped": None}],
    "patches": {"uncompressed": 48, "entered": 16, "average_share": 0.2},
    "sequence": {"uncompressed": 60, "entered": 28},
    "seconds": {"encode": 1.5, "compress": 0.004, "prefill": 0.25, "decode": 0.0},
    "calls": {"encode": 1, "compress": 1, "prefill": 1},
    "encoder": {"before": 2e12, "after": 2e12},
    "prefill": {"before": 1e13, "after": 2.5e12},
    "cache": {"before": 4e8, "after": 1e8},
    "peak_memory": 2_500_000_000,
    "memory_kind": "CUDA allocator",
}


def bars(svg: str, kind: str) -> list[dict[str, str | None]]:
    return [rect for rect in Page(svg).named("rect") if kind in (rect["class"] or "").split()]


def test_uniqueness_is_height_and_colour_of_the_bars() -> None:
    view = data(item(info={"frame_uniqueness": torch.tensor([-8.0, -6.0, -7.0, -7.5])}))
    chart = uniqueness_chart(view)
    assert chart is not None and chart.layers == [[-8.0, -6.0, -7.0, -7.5]]
    svg = str(frame_chart(chart, "u"))
    drawn = bars(svg, "bar")
    heights = [float(bar["height"] or 0) for bar in drawn]
    assert heights[1] == pytest.approx(2 * heights[2], abs=0.02) and heights[2] == pytest.approx(
        2 * heights[3], abs=0.02
    )
    assert 0 < heights[0] < 3
    colours = [tuple(map(int, re.findall(r"\d+", bar["style"] or ""))) for bar in drawn]
    assert len(set(colours)) == 4
    # Blue for the least unique frame, red for the most unique one.
    assert colours[0][2] > colours[0][0] and colours[1][0] > 2 * colours[1][2]
    assert "\N{MINUS SIGN}6.00" in svg and "0:01.0: \N{MINUS SIGN}6.000" in svg


def test_uniqueness_of_some_frames_stands_at_those_frames() -> None:
    view = data(item(4, 1, 2, keep=[0, 1, 6], info={"frame_uniqueness": torch.tensor([-2.0, -1.0])}))
    values = frame_uniqueness(view)
    assert values is not None and np.array_equal(values, [-2.0, np.nan, np.nan, -1.0], equal_nan=True)
    chart = uniqueness_chart(view)
    assert chart is not None and len(bars(str(frame_chart(chart, "u")), "bar")) == 2


@pytest.mark.parametrize("values", [None, [1.0, 2.0, 3.0], [1.0, float("nan"), 2.0, 3.0], []])
def test_no_uniqueness_is_invented(values: list[float] | None) -> None:
    info = {} if values is None else {"frame_uniqueness": torch.tensor(values)}
    assert uniqueness_chart(data(item(info=info))) is None


def test_equal_uniqueness_and_a_single_frame_do_no_harm() -> None:
    chart = uniqueness_chart(data(item(info={"frame_uniqueness": torch.full((4,), -1.0)})))
    assert chart is not None and len(bars(str(frame_chart(chart, "u")), "bar")) == 4
    assert uniqueness_chart(data(item(1, info={"frame_uniqueness": torch.tensor([-1.0])}))) is None


def test_budget_has_a_bar_per_frame_and_the_even_spread() -> None:
    view = data(item(4, 2, 2, keep=[0, 1, 2, 4, 8, 9]))
    chart = budget_chart(view, states(view.item))
    assert chart.layers == [[3, 1, 2, 0]] and chart.line == [1.5] * 4
    assert "between 0 and 3 tokens" in chart.description and "1.5 on average" in chart.description
    page = Page(str(frame_chart(chart, "b")))
    assert len(page.named("polyline")) == 1
    heights = [float(bar["height"] or 0) for bar in bars(str(frame_chart(chart, "b")), "bar")]
    assert heights[0] == pytest.approx(3 * heights[1], rel=0.01) and heights[3] == 0
    assert chart.tips[0] == "0:00.0: 3 of 4"


def test_budget_behind_a_cut_is_drawn_over_what_entered() -> None:
    view = data(item(2, 1, 4, keep=[0, 1, 2, 4], decoder={2: torch.tensor([1, 4])}))
    chart = budget_chart(view, states(view.item))
    assert chart.layers == [[3, 1], [1, 1]] and chart.line == [1.0, 1.0]
    svg = str(frame_chart(chart, "b"))
    assert len(bars(svg, "back")) == len(bars(svg, "front")) == 2
    assert chart.tips[0] == "0:00.0: 1 of 4, 3 entered" and "from layer 2 on" in chart.description


def test_charts_are_named_for_screen_readers_and_well_formed() -> None:
    view = data(item(300, 2, 2, info={"frame_uniqueness": torch.linspace(-3, -1, 300)}), frames(300, 8, 8))
    for identity, chart in (("u", uniqueness_chart(view)), ("b", budget_chart(view, states(view.item)))):
        assert chart is not None
        page = Page(str(frame_chart(chart, identity)))
        assert not page.errors and not page.open
        (svg,) = page.named("svg")
        assert svg["role"] == "img" and svg["aria-labelledby"] == f"{identity}-t {identity}-d"
        assert len(page.named("desc")) == 1 and chart.name in page.words
        assert len(chart.ticks) <= 5


def test_rows_show_before_behind_after() -> None:
    rows = [Measure("prefill", 25.0, 100.0, "100 to 25"), Measure("peak", 7.0, None, "7 GB", bar=False)]
    svg = str(bar_rows("Work", "What it took.", rows, "w"))
    (back,), (front,) = bars(svg, "back"), bars(svg, "front")
    assert float(back["width"] or 0) == pytest.approx(4 * float(front["width"] or 0))
    assert "7 GB" in Page(svg).words


def test_texts_in_charts_are_escaped() -> None:
    rows = [Measure("<script>alert(1)</script>", 1.0, None, "a & b")]
    svg = str(bar_rows("<b>", "\"'>", rows, "w"))
    assert "<script" not in svg and "<b>" not in svg and "a &amp; b" in svg


def test_claims() -> None:
    plain = data(item(4, 2, 2, keep=[0, 5, 9, 15]))
    assert claim(plain, states(plain.item)) == ("16 \N{RIGHTWARDS ARROW} 4 visual tokens (25.0 %)", "")
    both = data(item(4, 2, 2, keep=[0, 5, 9, 15], decoder={3: torch.tensor([0, 5])}))
    title, more = claim(both, states(both.item))
    assert "4 visual tokens (25.0 %)" in title and more == "2 of them (12.5 %) go on from layer 3 on."
    inside = data(item(4, 2, 2, keep=list(range(16)), decoder={2: torch.arange(8)}))
    title, more = claim(inside, states(inside.item))
    assert "8 visual tokens from layer 2 on (50.0 %)" in title and more == "All of them enter the LLM."


def test_requested_against_achieved() -> None:
    view = data(item(4, 2, 2, keep=list(range(8)), decoder={2: torch.arange(2)}), report=dict(REPORT))
    asked = [
        {"method": "a", "retention": 0.5, "counted": "patches that enter the LLM", "dropped": None},
        {"method": "b", "retention": 0.25, "counted": "patches behind the cut", "dropped": 0.75},
        {"method": "c", "retention": 0.3, "counted": "patches a decoder layer, averaged", "dropped": None},
    ]
    view = replace(view, report={**REPORT, "requested": asked})
    rows = requests(view, states(view.item))
    assert [(row["requested"], row["achieved"]) for row in rows] == [
        ("50.0 %", "50.0 %"),
        ("25.0 %", "25.0 %"),
        ("30.0 %", "20.0 %"),
    ]
    bare = data(item(4, 2, 2, keep=list(range(4))), method="Random", settings={"retention": 0.25})
    (row,) = requests(bare, states(bare.item))
    assert row["method"] == "Random" and row["requested"] == row["achieved"] == "25.0 %"
    assert requests(data(), states(item())) == []


def test_measures_come_from_the_report_and_are_never_invented() -> None:
    found = measures(data(report=REPORT))
    assert [row.name for row in found["time"]] == ["encode", "compress", "prefill"]
    assert [row.text for row in found["work"]] == [
        "2 TFLOPs",
        "10 TFLOPs \N{RIGHTWARDS ARROW} 2.5 TFLOPs (25.0 %)",
    ]
    assert found["memory"][1].text == "2.5 GB" and not found["memory"][1].bar
    assert measures(data()) == {}
    partly = {**REPORT, "encoder": None, "prefill": None, "cache": None, "peak_memory": 0, "calls": {}}
    assert list(measures(data(report=partly))) == ["time"]


def test_token_rows() -> None:
    view = data(report=REPORT)
    assert [row.name for row in token_rows(view, states(view.item))] == [
        "patches that enter the LLM",
        "whole prompt, text included",
    ]
    merged = data(item(merged=merge_map((0, 0, 1.0)), decoder={1: torch.tensor([0])}))
    assert token_rows(merged, states(merged.item))[1].text.startswith("48 \N{RIGHTWARDS ARROW} 1 (2.1 %)")


def test_even_choice_keeps_both_ends() -> None:
    assert even_choice(5, 8) == [0, 1, 2, 3, 4]
    chosen = even_choice(1000, 64)
    assert len(set(chosen)) == 64 and chosen[0] == 0 and chosen[-1] == 999
    assert set(np.diff(chosen)) <= {15, 16}
