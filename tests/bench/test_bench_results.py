"""Tables, files and pages from units written by hand."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench_items import item

from tokensieve.bench.data import Item
from tokensieve.bench.journal import Journal, Unit
from tokensieve.bench.output import csv_text, json_text, write_results
from tokensieve.bench.page import claim, ranked, render_page, verdict
from tokensieve.bench.results import Comparison, Results, summarise
from tokensieve.bench.settings import FULL, Setting, expand
from tokensieve.bench.statistics import kept_share, mcnemar, sign_flip
from tokensieve.errors import BenchError, TokensieveError

CLIPS = 12
HOSTILE = "</style><script>alert('x')</script>"


def unit(setting: str, clip: int, right: tuple[bool, bool], milliseconds: float, entered: int = 100) -> Unit:
    """Two answers about a clip."""
    answers = {f"clip-{clip}/{number}": {"given": "x", "right": good} for number, good in enumerate(right)}
    return {
        "setting": setting,
        "clip": f"clip-{clip}",
        "answers": answers,
        "own_encoding": False,
        "tokens": {"uncompressed": 400.0, "entered": entered, "average": entered, "last": entered},
        "seconds": {"encode": 0.2, "compress": 0.001, "prefill": milliseconds / 1e3 - 0.001, "decode": 0.01},
        "flops": {"prefill": 5e6, "prefill_full": 2e7, "encoder": None, "encoder_full": None},
    }


def results(path: Path, methods: tuple[str, ...] = ("vidcom2", "uniform")) -> Results:
    """The full model right on all of 12 clips; VidCom2 wrong once, uniform six times, random always."""
    items = [item(clip, number) for clip in range(CLIPS) for number in range(2)]
    settings = expand(methods, [0.25, 0.1])
    wrong = {"vidcom2": 1, "uniform": 6, "random": 24}
    times = {FULL: 100.0, "vidcom2": 20.0, "uniform": 30.0, "random": 10.0}
    with Journal(path, {}) as journal:
        for setting in settings:
            for clip in range(CLIPS):
                right = tuple(2 * clip + number >= wrong.get(setting.method, 0) for number in range(2))
                cost = times[setting.method] * (1.0 if setting.retention in (None, 0.25) else 0.5)
                journal.add(unit(setting.key, clip, right, cost, 400 if setting.is_full else 100))
        journal.refuse("flowcut @ 0.25", f"flowcut needs {HOSTILE}; methods that work here: many.")
        return summarise(items, settings, journal, {"model": "m", "prompt": "open", "data": HOSTILE})


@pytest.fixture
def found(tmp_path: Path) -> Results:
    return results(tmp_path / "j")


def test_accuracy_and_what_was_kept(found: Results) -> None:
    rows = {row.setting: row for row in found.rows}
    assert found.full.accuracy.value == 1.0 and found.full.against_full is None
    assert rows["vidcom2 @ 0.25"].accuracy.value == pytest.approx(23 / 24)
    expected = kept_share([(1.0, 2.0)] + [(2.0, 2.0)] * 11)
    assert rows["vidcom2 @ 0.25"].kept == expected
    assert rows["uniform @ 0.25"].kept == kept_share([(0.0, 2.0)] * 3 + [(2.0, 2.0)] * 9)
    assert sum(facts["questions"] for facts in found.families.values()) == 24
    assert all(facts["chance"] == pytest.approx(1 / 3) for facts in found.families.values())
    colour = [item(c, n) for c in range(CLIPS) for n in range(2) if item(c, n).family == "colour"]
    lost = sum(int(one.id.split("-")[1].split("/")[0]) < 3 for one in colour)
    assert rows["uniform @ 0.1"].families["colour"].value == pytest.approx(1 - lost / len(colour))


def test_comparisons_are_paired_and_corrected(found: Results) -> None:
    rows = {row.setting: row for row in found.rows}
    full, control = rows["uniform @ 0.1"].against_full, rows["uniform @ 0.1"].against_random
    assert full is not None and control is not None
    assert (full.reference, control.reference) == (FULL, "random @ 0.1")
    assert (full.lost, full.won, full.difference) == (6, 0, -0.25)
    assert full.mcnemar == mcnemar(6, 0) and full.p == sign_flip([-2, -2, -2]) == 0.25
    assert full.p_holm == 1.0 and verdict(full) == "undecided"
    assert (control.lost, control.won) == (0, 18) and control.p == pytest.approx(2 / 2**9)
    # Four comparisons with random; the two of VidCom2 have the smaller p, so uniform's are multiplied by two.
    assert control.p_holm == pytest.approx(2 * control.p) and verdict(control) == "better"
    assert rows["random @ 0.1"].against_random is None and verdict(None) == ""


def test_the_front(found: Results) -> None:
    """Faster or better than everything else: random and VidCom2 at 0.1, and the full model."""
    assert {row.setting for row in found.rows if row.on_front} == {"random @ 0.1", "vidcom2 @ 0.1", FULL}


def test_times_are_medians_and_tokens_means(found: Results) -> None:
    row = found.rows[1]
    assert row.milliseconds == pytest.approx({"encode": 200, "compress": 1, "prefill": 9, "decode": 10, "llm": 10})
    assert row.achieved == 0.25 and row.flops["prefill_share"] == 0.25 and row.flops["encoder_share"] is None


def test_without_answers_of_the_full_model_there_is_no_result(tmp_path: Path) -> None:
    items: list[Item] = [item(0, 0), item(0, 1)]
    with Journal(tmp_path / "j", {}) as journal:
        journal.add({"setting": FULL, "clip": "clip-0", "error": "out of luck"})
        with pytest.raises(BenchError, match="out of luck"):
            summarise(items, [Setting(FULL)], journal, {})


class Page(HTMLParser):
    """Tags that were not closed, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.errors: list[str] = []
        self.words = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_well_formed_and_says_what_was_found(found: Results) -> None:
    text = render_page(found)
    page = Page(text)
    assert not page.errors and not page.open
    assert claim(found) == (
        "1 of 1 methods beats random choice at 10 % of the visual tokens",
        "The full model answers 100.0 % of 24 questions, random choice 0.0 %, the highest method 95.8 % (vidcom2).",
    )
    order = [row.setting for _, rows in ranked(found) for row in rows]
    assert order == [FULL, *(f"{name} @ {share}" for share in (0.25, 0.1) for name in ("vidcom2", "uniform", "random"))]
    for words in (*claim(found), "24 questions about 12 clips", "uniform @ 0.1", "Accuracy over retention", "Not run"):
        assert words in page.words
    assert page.tags.count("svg") == 2 and "many." not in page.words
    assert "0 won, 6 lost against full model" in text


def test_the_page_loads_nothing_and_runs_nothing(found: Results) -> None:
    text = render_page(found)
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert HOSTILE not in text and "&lt;/style&gt;" in text


def test_one_retention_has_no_curves(tmp_path: Path) -> None:
    items = [item(clip, number) for clip in range(2) for number in range(2)]
    settings = expand(["uniform"], [0.5])
    with Journal(tmp_path / "j", {}) as journal:
        for setting in settings:
            for clip in range(2):
                journal.add(unit(setting.key, clip, (True, False), 10.0))
        page = Page(render_page(summarise(items, settings, journal, {"prompt": "open"})))
    assert page.tags.count("svg") == 1 and not page.errors


def test_files(found: Results, tmp_path: Path) -> None:
    written = write_results(found, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["results.json", "results.csv", "results.html"]
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert len(rows) == 7 * 4
    whole = next(row for row in rows if row["setting"] == "vidcom2 @ 0.25" and row["family"] == "all")
    assert float(whole["accuracy"]) == pytest.approx(23 / 24, abs=1e-5) and whole["tokens_entered"] == "100"
    assert whole["difference_to_random"] == "0.958333" and whole["p_full_holm"] == "1"
    data = json.loads(json_text(found))
    assert data["rows"][0]["setting"] == FULL and data["refused"]["flowcut @ 0.25"].startswith("flowcut needs")
    (tmp_path / "file").write_text("")
    with pytest.raises(TokensieveError, match="cannot be made"):
        write_results(found, tmp_path / "file" / "folder")


def test_verdicts() -> None:
    made = Comparison("r", -0.1, 5, 0, 0.01, 0.01, 0.04)
    assert verdict(made) == "worse"
