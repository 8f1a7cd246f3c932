"""Batches without Ray: what is listed, what is remembered, what the two kinds of workers do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bridge_media import write_video

import tokensieve
from tokensieve.bridges.ray_batch import (
    BatchSettings,
    Item,
    Journal,
    Workers,
    read_items,
    run_batch,
    write_failed,
    write_table,
)
from tokensieve.bridges.ray_batch.table import COLUMNS, check_format, failed_path, journal_path
from tokensieve.bridges.ray_batch.workers import Answerer, Decoder
from tokensieve.errors import TokensieveError
from tokensieve.hosts import tiny
from tokensieve.prompt import build_prompt
from tokensieve.video import read_clip


def record(identity: str, status: str = "ok", **more: Any) -> dict[str, Any]:
    item = Item(identity, f"/{identity}.mp4", "What?")
    return {**item.to_dict(), "status": status, "answer": f"answer {identity}", "reason": "why", **more}


def items(*names: str) -> list[Item]:
    return [Item(name, f"/{name}.mp4", "What?") for name in names]


def test_a_folder_is_searched_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MKV", "deep/er/c.webm", "notes.txt", "deep/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = read_items(tmp_path, "What?")
    assert [item.id for item in found] == ["a.MKV", "b.mp4", "deep/er/c.webm"]
    assert found[2] == Item("deep/er/c.webm", str(tmp_path / "deep/er/c.webm"), "What?")


def test_manifests(tmp_path: Path) -> None:
    rows = [
        {"video": "a.mp4"},
        {"video": "a.mp4", "question": "Again?", "start": 1, "end": 2.5},
        {"id": 7, "video": "https://example.org/b.mp4"},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    local = str(tmp_path / "a.mp4")
    assert read_items(path, "What?") == [
        Item("a.mp4", local, "What?"),
        Item("a.mp4#2", local, "Again?", 1.0, 2.5),
        Item("7", "https://example.org/b.mp4", "What?"),
    ]
    table = tmp_path / "list.csv"
    table.write_text('video,question,start\na.mp4,"Who, and where?",\nb.mp4,What?,3\n')
    assert read_items(table) == [
        Item("a.mp4", local, "Who, and where?"),
        Item("b.mp4", str(tmp_path / "b.mp4"), "What?", 3.0),
    ]
    plain = tmp_path / "list.txt"
    plain.write_text("a.mp4\n/b.mp4\n")
    assert [item.video for item in read_items(plain, "What?")] == [local, "/b.mp4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"video": "a"}\n{"video": ""}\n', "Line 2 .* names no video"),
        ("x.jsonl", '{"video": "a", "id": 1}\n{"video": "b", "id": "1"}\n', "Line 2 .* repeats the id '1'"),
        ("x.jsonl", "{\n", "Line 1 .* is no JSON"),
        ("x.jsonl", "[]\n", "Line 1 .* is no object"),
        ("x.jsonl", '{"video": "a", "start": "soon"}\n', "start='soon', which is no number"),
        ("x.csv", "film,question\na,b\n", "Line 2 .* names no video"),
        ("x.txt", "\n\n", "has no rows"),
        ("x.xml", "<a/>", "ends in .jsonl, .csv or .txt"),
        ("x.txt", "a.mp4\n\udcff", "cannot be read|names"),
    ],
)
def test_manifests_that_are_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(TokensieveError, match=message):
        read_items(path, "What?")


def test_sources_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(TokensieveError, match="holds no video"):
        read_items(tmp_path, "What?")
    with pytest.raises(TokensieveError, match="neither a folder nor a manifest"):
        read_items(tmp_path / "missing", "What?")
    (tmp_path / "a.mp4").write_bytes(b"x")
    for question in (None, "  "):
        with pytest.raises(TokensieveError, match="has no question; give --question"):
            read_items(tmp_path, question)


def test_the_journal_remembers(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, {"model": "m"}) as journal:
        assert journal.append(record("a")) and journal.append(record("b", "failed"))
        assert not journal.append(record("a", answer="another"))
        assert journal.append(record("b"))
        assert journal.append(record("c", "failed"))
    with Journal(path, {"model": "m"}) as journal:
        assert [item.id for item in journal.open_items(items("a", "b", "c", "d"))] == ["d"]
        assert [item.id for item in journal.open_items(items("a", "b", "c"), retry_failed=True)] == ["c"]
        found = list(journal.results(items("c", "a", "x")))
        assert [(one["id"], one["answer"]) for one in found] == [("c", "answer c"), ("a", "answer a")]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    with Journal(path, {}) as journal:
        journal.append(record("a"))
        journal.append(record("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, {}) as journal:
        assert [item.id for item in journal.open_items(items("a", "b"))] == ["b"]
        journal.append(record("b"))
    with Journal(path, {}) as journal:
        assert journal.open_items(items("a", "b")) == []


def test_an_id_that_means_something_else_now_is_answered_anew(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {}) as journal:
        journal.append(record("a"))
        other = Item("a", "/a.mp4", "Another question?")
        assert journal.open_items([other]) == [other]
        assert list(journal.results([other])) == []
        assert journal.append({**other.to_dict(), "status": "ok", "answer": "new"})


def test_journals_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, {"model": "m", "frames": 8}), pytest.raises(TokensieveError, match="Another run is writing"):
        Journal(path, {"model": "m", "frames": 8})
    with pytest.raises(TokensieveError, match="another frames; choose another -o, or begin anew with --restart"):
        Journal(path, {"model": "m", "frames": 9})
    for content in (b"text\n", b"{}\n", b"[]\n", path.read_bytes() + b"garbage\n"):
        path.write_bytes(content)
        with pytest.raises(TokensieveError, match="is no journal"):
            Journal(path, {"model": "m", "frames": 8})
        assert path.read_bytes() == content
    with pytest.raises(TokensieveError, match="cannot be written"):
        Journal(tmp_path / "missing" / "j", {})


def test_tables(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install 'tokensieve[batch]'")
    records = [record("a", new_tokens=3, seconds_read=0.5, other=1), record("b", "failed"), record("c")]
    for name in ("out.parquet", "out.jsonl"):
        output = tmp_path / name
        check_format(output)
        assert write_table(output, records, {"method": "vidcom2"}) == 2
        assert write_failed(output, records) == 1
        if name == "out.parquet":
            table = parquet.read_table(output)
            assert json.loads(table.schema.metadata[b"tokensieve"]) == {"method": "vidcom2"}
            rows = table.to_pylist()
        else:
            rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert list(rows[0]) == list(COLUMNS)
        assert [(row["id"], row["new_tokens"], row["seconds_read"]) for row in rows] == [
            ("a", 3, 0.5),
            ("c", None, None),
        ]
    failed = json.loads(failed_path(tmp_path / "out.parquet").read_text())
    assert failed == {"id": "b", "video": "/b.mp4", "question": "What?", "reason": "why"}
    assert write_failed(tmp_path / "out.parquet", records[:1]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.parquet"]
    assert journal_path(tmp_path / "out.parquet").name == "out.parquet.journal"
    for bad, message in ((tmp_path / "out.txt", "must end in"), (tmp_path / "no" / "out.jsonl", "does not exist")):
        with pytest.raises(TokensieveError, match=message):
            check_format(bad)


def test_workers_that_make_no_sense() -> None:
    for options in ({"models": 0}, {"decoders": 0}, {"batch_size": 0}, {"gpus": -1.0}):
        with pytest.raises(TokensieveError, match="1 or more"):
            Workers(**options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def settings() -> BatchSettings:
    return BatchSettings(str(tiny.cached("llava_onevision")), "vidcom2", 0.25, frames=4, max_new_tokens=6)


def through(settings: BatchSettings, wanted: list[Item]) -> dict[str, dict[str, Any]]:
    """Both workers, one after the other."""
    prepared = Decoder(settings)({"item": [json.dumps(item.to_dict()) for item in wanted]})
    finished = Answerer(settings, "cpu")(prepared)["record"]
    found = [json.loads(text) for text in finished]
    assert len(found) == len({one["id"] for one in found}) == len(wanted)
    return {one["id"]: one for one in found}


def test_workers_answer_as_the_library_does(
    settings: BatchSettings, loaded: tuple[Any, Any], video: Path, other_video: Path, picture: Path, folder: Path
) -> None:
    short = write_video(folder / "short.mp4", count=2)
    broken = folder / "broken.mp4"
    broken.write_bytes(b"not a video")
    wanted = [
        Item("a", str(video), "What moves?"),
        Item("b", str(other_video), "Which shape is in front?"),
        Item("short", str(short), "What moves?"),
        Item("still", str(picture), "Which colour?"),
        Item("broken", str(broken), "What moves?"),
        Item("part", str(video), "What moves?", 1.0, 3.0),
        Item("late", str(video), "What moves?", 100.0),
    ]
    found = through(settings, wanted)
    model, processor = loaded
    for item in (wanted[0], wanted[1], wanted[2], wanted[3], wanted[5]):
        clip = read_clip(item.video, 4, start=item.start, end=item.end)
        inputs = build_prompt(processor, clip, item.question).on(model)
        with tokensieve.compress(model, "vidcom2", retention=0.25) as run:
            produced = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = produced[0, inputs["input_ids"].shape[1] :]
        one = found[item.id]
        assert one["answer"] == processor.tokenizer.decode(new, skip_special_tokens=True).strip(), item
        assert one["tokens_visual"] == run.report.patches.entered
        assert one["tokens_prompt_before"] == inputs["input_ids"].shape[1]
        assert (one["status"], one["frames"], one["new_tokens"]) == ("ok", len(clip), 6)
        assert all(one[name] > 0 for name in COLUMNS if name.startswith("seconds_"))
    assert found["broken"]["status"] == found["late"]["status"] == "failed"
    assert "broken.mp4" in found["broken"]["reason"] and "after the end" in found["late"]["reason"]


def test_a_batch_whose_generation_fails_is_reported_clip_by_clip(
    settings: BatchSettings, video: Path, other_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Decoder(settings)(
        {
            "item": [
                json.dumps(Item(str(n), str(path), "What?").to_dict()) for n, path in enumerate((video, other_video))
            ]
        }
    )
    assert len(prepared["inputs"]) == 1
    answerer = Answerer(settings, "cpu")

    def fail(**inputs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(answerer._model, "generate", fail)
    found = [json.loads(text) for text in answerer(prepared)["record"]]
    assert [(one["id"], one["status"]) for one in found] == [("0", "failed"), ("1", "failed")]
    assert "in a batch of 2; try --batch-size 1" in found[0]["reason"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava", "video_llama_3", "llava_video"])
def test_prepared_prompts_travel_whole(family: str, video: Path, other_video: Path) -> None:
    """Rows of two clips of other families give what each clip gives alone."""
    settings = BatchSettings(str(tiny.cached(family)), "uniform", 0.5, frames=4, max_new_tokens=3)
    both = [Item("a", str(video), "What moves?"), Item("b", str(other_video), "Which shape is seen in front of all?")]
    together = through(settings, both)
    for item in both:
        alone = through(settings, [item])[item.id]
        for name in ("answer", "tokens_visual", "tokens_prompt", "tokens_prompt_before", "new_tokens"):
            assert together[item.id][name] == alone[name], (item.id, name)


def test_the_command_refuses_before_anything_starts(tmp_path: Path, video: Path, capsys: Any) -> None:
    from tokensieve.cli import app

    run: Callable[..., None] = app
    words = [str(video.parent), "-q", "What?", "-o", str(tmp_path / "out.parquet")]
    cases = [
        ([*words, "--method", "vidcon2"], "did you mean vidcom2"),
        ([*words, "--frames", "0"], "--frames must be 1 or more"),
        ([*words, "--model", str(tmp_path)], "no config.json"),
        ([*words, "--models", "0"], "1 or more"),
        ([*words[:-1], str(tmp_path / "out.xml")], "must end in"),
        ([str(tmp_path / "none"), *words[1:]], "neither a folder nor a manifest"),
    ]
    for line, message in cases:
        with pytest.raises(SystemExit) as end:
            run(["batch", *line])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", [None, "10.0.0.7:6379"])
def test_a_cluster_that_cannot_be_used(
    tmp_path: Path, settings: BatchSettings, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    ray = pytest.importorskip("ray", reason="needs pip install 'tokensieve[batch]'")
    asked: list[dict[str, Any]] = []

    def fail(**options: Any) -> None:
        asked.append(options)
        raise Exception("first line\nThe node timed out.")

    monkeypatch.setattr(ray, "init", fail)
    with (
        Journal(tmp_path / "j", {}) as journal,
        pytest.raises(TokensieveError, match=r"cannot be used at .* \(The node timed out\.\); .*\.$"),
    ):
        run_batch(items("a"), settings, Workers(models=3, decoders=5, address=address), journal)
    assert asked[0]["address"] == (address or "local")
    # A cluster has the cores that it has; on this machine there are at least as many as workers.
    assert ("num_cpus" in asked[0]) is (address is None) and asked[0].get("num_cpus", 8) >= 8


def test_a_cluster_that_is_too_small(tmp_path: Path, settings: BatchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs pip install 'tokensieve[batch]'")
    ended: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with (
        Journal(tmp_path / "j", {}) as journal,
        pytest.raises(TokensieveError, match="need 3 processor cores and 2 GPUs, but Ray has 16 and 1"),
    ):
        run_batch(items("a"), settings, Workers(models=2, gpus=1.0), journal)
    assert ended == [True] and journal.records == {}


def test_nothing_to_do_starts_nothing(tmp_path: Path, settings: BatchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokensieve.bridges.ray_batch.pipeline._cluster", lambda workers: 1 / 0)
    with Journal(tmp_path / "j", {}) as journal:
        run_batch([], settings, Workers(), journal)
