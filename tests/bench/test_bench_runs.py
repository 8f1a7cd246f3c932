"""Whole benchmarks on a small model: exactness, journals, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_items import item, loaded

from tokensieve.bench.asking import MOST_NEW_TOKENS, answer, write
from tokensieve.bench.data import Item, by_clip, clip_of
from tokensieve.bench.engine import bench_session, remaining
from tokensieve.bench.journal import Journal
from tokensieve.bench.results import Results
from tokensieve.bench.session import Session
from tokensieve.bench.settings import FULL, Setting, expand
from tokensieve.errors import BenchError, MethodError, RetentionError
from tokensieve.prompt import build_prompt

CONFIGURATION = {"model": "tiny", "seed": 0}
METHODS = ("vidcom2", "uniform", "fastv:layer=2")


def run(path: Path, items: list[Item], settings: list[Setting], style: Any = "open") -> Results:
    model, processor = loaded()
    with Journal(path, CONFIGURATION) as journal:
        return bench_session(Session(model, processor, settings, style), items, settings, journal)


def timeless(results: Results) -> dict[str, Any]:
    """Results without times, which no two runs share."""
    found = results.to_dict()
    for row in found["rows"]:
        row.pop("milliseconds")
        row.pop("on_front")
    return found


@pytest.mark.parametrize("style", ["open", "letters"])
def test_retention_one_answers_as_the_full_model(tmp_path: Path, items: list[Item], style: str) -> None:
    """Word for word, also against the model without any hook."""
    model, processor = loaded()
    settings = expand([*METHODS, "tome", "frame-subsample"], [1.0])
    path = tmp_path / "journal.jsonl"
    results = run(path, items, settings, style)
    assert not results.refused
    with Journal(path, CONFIGURATION) as journal:
        for clip, asked in by_clip(items).items():
            inputs = build_prompt(processor, clip_of(asked[0]), [write(one, style) for one in asked])  # type: ignore[arg-type]
            bare = answer(model, processor.tokenizer, inputs.on(model), asked, style)  # type: ignore[arg-type]
            for setting in settings:
                given = journal.units[setting.key, clip]["answers"]
                assert [given[one.id]["given"] for one in asked] == bare, setting
    for row in results.rows[1:]:
        assert row.against_full is not None
        assert row.against_full.lost == row.against_full.won == 0 and row.against_full.p == 1.0
        assert row.achieved == 1.0


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "video_llama_3"])
def test_other_families(tmp_path: Path, items: list[Item], family: str) -> None:
    """Frames as single images, three position axes, whole frames: equal at retention 1.0, fewer tokens below."""
    model, processor = loaded(family)
    settings = [Setting(FULL), *(Setting("vidcom2", share) for share in (1.0, 0.4)), Setting("random", 0.4)]
    with Journal(tmp_path / "j", CONFIGURATION) as journal:
        results = bench_session(Session(model, processor, settings, "open"), items[:2], settings, journal)
        full, same = (journal.units[setting.key, "clip-0"]["answers"] for setting in settings[:2])
    assert not results.refused and full == same
    shares = {row.setting: row.achieved for row in results.rows}
    assert shares["vidcom2 @ 1"] == 1.0 and 0.2 < shares["vidcom2 @ 0.4"] < 0.5 and shares["random @ 0.4"] < 0.5


def test_letters_are_scored_without_decoding(items: list[Item]) -> None:
    """The candidate whose letter scores highest, alone or behind a blank, by a reference that reads all logits."""
    model, processor = loaded()
    asked = items[:2]
    inputs = build_prompt(processor, clip_of(asked[0]), [write(one, "letters") for one in asked]).on(model)
    with torch.inference_mode():
        scores = model(**inputs).logits[:, -1]
    tokenizer = processor.tokenizer
    expected = []
    for row, one in zip(scores, asked, strict=True):
        tokens = {
            letter: [
                ids[0]
                for text in (letter, f" {letter}")
                if len(ids := tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
            ]
            for letter in "ABC"
        }
        best = max(tokens, key=lambda letter: max(float(row[token]) for token in tokens[letter]))
        expected.append(one.candidates["ABC".index(best)])
    assert answer(model, tokenizer, inputs, asked, "letters") == expected


def test_tokens_asked_for_and_achieved(tmp_path: Path, items: list[Item]) -> None:
    results = run(tmp_path / "j", items, expand(["uniform", "fastv:layer=2", "vidcom2:retention=0.5"], [0.2]))
    rows = {row.setting: row for row in results.rows}
    assert [row.setting for row in results.rows][:2] == [FULL, "random @ 0.2"]
    full = rows[FULL].tokens
    assert full["uncompressed"] == full["entered"] == full["last"] == 6 * 25
    assert rows["uniform @ 0.2"].tokens["entered"] == 30
    fastv = rows["fastv:layer=2 @ 0.2"].tokens
    assert fastv["entered"] == 150 and fastv["last"] == 30 and 30 < fastv["average"] < 150
    own = rows["vidcom2:retention=0.5"]
    assert own.retention is None and own.against_random is not None
    assert rows["uniform @ 0.2"].flops["prefill_share"] is not None
    assert rows["uniform @ 0.2"].flops["prefill_share"] < 0.5  # type: ignore[operator]
    assert all(rows[key].milliseconds["llm"] > 0 for key in rows)


def test_a_killed_run_ends_with_the_same_table(tmp_path: Path, items: list[Item]) -> None:
    """Cut anywhere, also in the middle of a line, the journal leads to the results of an undisturbed run."""
    settings = expand(["vidcom2"], [0.3])
    whole = tmp_path / "whole"
    expected = timeless(run(whole, items, settings))
    content = whole.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in (len(lines[0]) - 4, len(content) // 2, len(content) - 1):
        path = tmp_path / f"cut-{cut}"
        path.write_bytes(content[:cut])
        complete = content[:cut].count(b"\n")
        assert timeless(run(path, items, settings)) == expected
        # Lines that were whole are still there, and no unit is there twice.
        assert path.read_bytes().splitlines(keepends=True)[:complete] == lines[:complete]
        assert path.read_bytes().count(b'"unit"') == content.count(b'"unit"')


def test_finished_units_are_not_run_again(tmp_path: Path, items: list[Item]) -> None:
    settings = expand(["uniform"], [0.3])
    path = tmp_path / "j"
    run(path, items, settings)
    before = path.read_bytes()
    with Journal(path, CONFIGURATION) as journal:
        assert remaining(journal, items, settings) == []
    run(path, items, settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("configuration", "words"),
    [({**CONFIGURATION, "seed": 1}, "another seed"), ({**CONFIGURATION, "new": 2}, "another new")],
)
def test_a_journal_of_another_benchmark_is_refused(tmp_path: Path, configuration: Any, words: str) -> None:
    path = tmp_path / "j"
    with Journal(path, CONFIGURATION):
        pass
    with pytest.raises(BenchError, match=words):
        Journal(path, configuration)


def test_files_that_are_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text('{"some": "thing"}\n')
    with pytest.raises(BenchError, match="no journal of this version"):
        Journal(path, CONFIGURATION)
    path.write_text(json.dumps({"format": 1, "configuration": CONFIGURATION}) + "\n{broken\n")
    with pytest.raises(BenchError, match="line 2 is no JSON"):
        Journal(path, CONFIGURATION)
    with pytest.raises(BenchError, match="cannot be used"):
        Journal(tmp_path, CONFIGURATION)


def test_refusals_are_listed_with_their_reason(tmp_path: Path, items: list[Item]) -> None:
    """A method that the tower cannot serve, and one that cannot cut where it is told to."""
    settings = expand(["flowcut", "fastv:layer=99", "uniform"], [0.3])
    results = run(tmp_path / "j", items, settings)
    assert set(results.refused) == {"flowcut @ 0.3", "fastv:layer=99 @ 0.3"}
    assert "tower.class_token" in results.refused["flowcut @ 0.3"] and "99" in results.refused["fastv:layer=99 @ 0.3"]
    assert {row.setting for row in results.rows} == {FULL, "random @ 0.3", "uniform @ 0.3"}
    assert timeless(run(tmp_path / "j", items, settings)) == timeless(results)


def test_a_method_that_fails_on_some_clips_has_no_accuracy(
    tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokensieve.methods.controls import UniformTokens

    original, calls = UniformTokens.select, [0]

    def select(self: Any, sample: Any, count: int) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise IndexError("out of luck")
        return original(self, sample, count)

    monkeypatch.setattr(UniformTokens, "select", select)
    results = run(tmp_path / "j", items, expand(["uniform"], [0.3]))
    assert "failed on 1 of 3 clips: IndexError: out of luck (this is a bug)" in results.refused["uniform @ 0.3"]


def test_settings() -> None:
    keys = [setting.key for setting in expand(["vidcom2", "vidcom2:retention=0.4", "vidcom2"], [0.5, 0.1, 0.5])]
    assert keys == [
        FULL,
        "random @ 0.5",
        "random @ 0.1",
        "vidcom2 @ 0.5",
        "vidcom2 @ 0.1",
        "vidcom2:retention=0.4",
    ]
    everything = {setting.method for setting in expand(["all"], [0.5])}
    assert {"random", "uniform", "mean-pool", "vidcom2", FULL} <= everything and "none" not in everything
    with pytest.raises(MethodError, match="no method 'vidcon'"):
        expand(["vidcon"], [0.5])
    with pytest.raises(RetentionError, match="2"):
        expand(["vidcom2"], [2])
    with pytest.raises(BenchError, match="nothing to compare"):
        expand([], [0.5])


def test_options_reach_the_parts_that_have_them() -> None:
    (method,) = Setting("random", 0.3).build({"seed": 7, "text_tower": "somewhere"})
    assert method.options()["seed"] == 7 and method.retention == 0.3
    (method,) = Setting("random:seed=3", 0.3).build({"seed": 7})
    assert method.options()["seed"] == 3


def test_long_answers_are_cut() -> None:
    """Free answers hold at most eight tokens, as the model's own generation gives them."""
    model, processor = loaded()
    asked = [item(0, 0)]
    inputs = build_prompt(processor, clip_of(asked[0]), [write(asked[0], "open")]).on(model)
    out = model.generate(**inputs, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
    text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer(model, processor.tokenizer, inputs, asked, "open") == [text]
