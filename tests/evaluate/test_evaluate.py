"""Evaluation protocols: loaders on annotation samples, prompts, frames, a judge over HTTP, scores, commands."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ppllava_tiny import build
from typer.testing import CliRunner

from tokensieve.evaluate.__main__ import app
from tokensieve.evaluate.answering import answer_all, read_answers, sampled_frames, shown_subtitles
from tokensieve.evaluate.judging import AXES, Judge, judge_all, judge_prompt
from tokensieve.evaluate.protocols import protocol_for
from tokensieve.evaluate.questions import EvaluationError, Question, Subtitle, load_questions
from tokensieve.evaluate.scoring import chosen_letter, score_choices, score_verdicts


class TestLoaders:
    def test_mvbench(self, samples: Path) -> None:
        found = load_questions("mvbench", samples / "mvbench")
        assert {question.group for question in found} == {"action_antonym", "action_sequence", "episodic_reasoning"}
        assert len({question.id for question in found}) == len(found) >= 14
        first = next(question for question in found if question.group == "action_sequence")
        assert (first.video, first.answer, first.start, first.end) == ("ZS9XR.mp4", "A", 4.5, 27.1)
        assert first.options[0] == "Ate the medicine." and first.rate is None
        folder = next(question for question in found if question.group == "episodic_reasoning")
        assert (folder.answer, folder.rate) == ("B", 3.0)
        assert len(load_questions("mvbench", samples / "mvbench" / "action_antonym.json")) == 12

    def test_videomme(self, samples: Path) -> None:
        plain = load_questions("videomme", samples / "videomme" / "test.jsonl")
        spoken = load_questions("videomme", samples / "videomme" / "test.jsonl", samples / "videomme" / "subtitle")
        assert plain[0].options == ("Two.", "Three.", "Four.", "Five.") and plain[0].answer == "B"
        assert {question.frames for question in plain if question.group == "short"} == {None}
        assert {question.frames for question in plain if question.group != "short"} <= {64}
        assert not plain[0].subtitles
        assert spoken[0].subtitles[0] == Subtitle(0.0, 2.5, "(invented subtitle one)")
        with pytest.raises(EvaluationError, match="has no subtitles"):
            load_questions("mvbench", samples / "mvbench", samples)

    def test_open_questions(self, samples: Path) -> None:
        net = load_questions("activitynet", samples / "activitynet_qa")
        assert len(net) == 200 and net[0].video == "v_1QIUV7WYKXg" and net[0].answer == "no" and net[0].group == "3"
        for name in ("MSVD_QA", "MSRVTT_QA", "ActivityNet_QA"):
            rows = load_questions("open", samples / "ig_vlm_csv" / f"{name}.csv")
            assert len(rows) == 150 and all(row.question and row.answer and row.video for row in rows)

    def test_vcg(self, tmp_path: Path) -> None:
        (tmp_path / "generic_qa.json").write_text(json.dumps([{"Q": "What?", "A": "This.", "video_name": "v"}]))
        pair = {"Q1": "Who?", "Q2": "Which person?", "A": "He.", "video_name": "v"}
        (tmp_path / "consistency_qa.json").write_text(json.dumps([pair]))
        found = load_questions("vcg", tmp_path)
        assert [question.id for question in found] == ["generic-0", "consistency-0.1", "consistency-0.2"]
        assert [question.question for question in found] == ["What?", "Who?", "Which person?"]

    def test_faults(self, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match="'x' is unknown"):
            load_questions("x", tmp_path)
        for task in ("mvbench", "activitynet", "vcg"):
            with pytest.raises(EvaluationError):
                load_questions(task, tmp_path)
        path = tmp_path / "task.json"
        path.write_text(json.dumps([{"video": "a.mp4", "question": "q", "candidates": ["x"], "answer": "y"}]))
        with pytest.raises(EvaluationError, match="not among its options"):
            load_questions("mvbench", path)
        path.write_text(json.dumps([{"video": "a.mp4"}]))
        with pytest.raises(EvaluationError, match=r"task\.json:0 has no field 'candidates'"):
            load_questions("mvbench", path)
        path.write_text("{")
        with pytest.raises(EvaluationError, match="is no JSON"):
            load_questions("mvbench", path)
        with pytest.raises(EvaluationError, match="leads out of"):
            Question("1", "../secret", "q").locate(tmp_path)
        with pytest.raises(EvaluationError, match="is not in"):
            Question("1", "gone", "q").locate(tmp_path)


class TestPrompts:
    def test_choices(self) -> None:
        question = Question("1", "v", "Who runs?", ("a dog", "a cat"), "A")
        text = protocol_for("mvbench").text(question)
        assert "Who runs?" in text and "(A) a dog\n(B) a cat" in text
        assert protocol_for("mvbench").for_text_tower(question) == "Who runs?\n(A) a dog\n(B) a cat"
        assert "['A. a dog', 'B. a cat']" in protocol_for("videomme").text(question)

    def test_subtitles_of_sampled_frames(self) -> None:
        lines = [Subtitle(0, 1, "one"), Subtitle(1.5, 2, "two"), Subtitle(5, 9, "three {x}")]
        shown = shown_subtitles(lines, [0.5, 0.7, 6.0])
        assert [line.text for line in shown] == ["one", "three {x}"]
        text = protocol_for("videomme").text(Question("1", "v", "Why?", ("a",)), shown)
        assert "one\nthree {x}" in text and "two" not in text
        assert "ubtitles of the video" not in protocol_for("videomme").text(Question("1", "v", "Why?", ("a",)))

    def test_own_words(self) -> None:
        protocol = protocol_for("activitynet", user="{question}!", frames=4)
        assert protocol.text(Question("1", "v", "Why")) == "Why!" and protocol.frames == 4
        assert protocol_for("open").new_tokens == 200
        with pytest.raises(EvaluationError, match="no such field"):
            protocol_for("open", colour="red")
        with pytest.raises(EvaluationError, match="has no protocol"):
            protocol_for("x")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """One video as a folder of 30 pictures of rising brightness."""
    folder = tmp_path / "videos" / "clip"
    folder.mkdir(parents=True)
    for number in range(30):
        Image.fromarray(np.full((20, 30, 3), 8 * number, dtype=np.uint8)).save(folder / f"{number + 1:05}.png")
    return folder.parent


class TestAnswers:
    def test_frames_of_a_range(self, videos: Path) -> None:
        question = Question("1", "clip", "q", start=2.0, end=6.0, rate=3.0)
        frames, times = sampled_frames(question, question.locate(videos), 4)
        wanted = [int(6 + 12 / 8 + round(12 / 4 * k)) for k in range(4)]
        assert (frames[:, 0, 0, 0] // 8).tolist() == wanted
        assert times == [number / 3.0 for number in wanted]

    def test_answers_are_written_once(self, videos: Path, tmp_path: Path) -> None:
        model, processor = build()
        questions = [
            Question(str(number), "clip", f"Where is the {what}?", ("left", "right"), "A", "place", rate=3.0)
            for number, what in enumerate(("ball", "dog", "box"))
        ]
        protocol = protocol_for("mvbench", frames=4, new_tokens=3)
        path = tmp_path / "out" / "answers.jsonl"
        first = answer_all(model, processor, protocol, questions[:2], videos, path)
        with path.open("a") as file:
            file.write('{"id": "2", "resp')
        calls: list[int] = []
        handle = model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
        rows = answer_all(model, processor, protocol, questions, videos, path)
        handle.remove()
        assert rows[:2] == first and [row["id"] for row in rows] == ["0", "1", "2"] and len(calls) == 1
        assert read_answers(path) == rows and rows[2]["options"] == ["left", "right"]

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match="cannot be read"):
            read_answers(tmp_path / "gone.jsonl")
        (tmp_path / "a.jsonl").write_text("x\n{}\n")
        with pytest.raises(EvaluationError, match="Line 1"):
            read_answers(tmp_path / "a.jsonl")


@pytest.fixture
def service() -> Iterator[Any]:
    """A judge on this machine; ``replies`` are given one after the other, the last one for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
            if isinstance(reply, int):
                self.send_response(reply)
                self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()
                return
            data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies = [], ['{"pred": "yes", "score": 4}']
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


ROW = {"id": "1", "group": "0", "question": "Who runs?", "answer": "dog", "response": "A dog runs."}


class TestJudge:
    def test_verdicts(self, service: Any) -> None:
        service.replies = ["I think: {'pred': 'no', 'score': 1}"]
        verdicts = judge_all(Judge(service.url, "m", key="k"), [ROW])
        assert verdicts == [{"id": "1", "axis": None, "score": 1.0, "pred": "no"}]
        path, key, body = service.requests[0]
        assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer k", "m", 0)
        assert all(text in body["messages"][0]["content"] for text in ("Who runs?", "dog", "A dog runs."))

    def test_useless_replies_are_asked_again(self, service: Any) -> None:
        service.replies = ["no idea", 500, '{"pred": "yes", "score": 9}', '{"pred": "yes", "score": 5}']
        assert judge_all(Judge(service.url, "m", attempts=4), [ROW])[0]["score"] == 5
        service.replies = ["no idea"]
        assert judge_all(Judge(service.url, "m"), [ROW]) == [{"id": "1", "axis": None, "score": None, "pred": None}]

    @pytest.mark.parametrize("status", [500, 302])
    def test_failures(self, service: Any, status: int) -> None:
        service.replies = [status]
        with pytest.raises(EvaluationError, match=f"no usable reply .*{status}"):
            judge_all(Judge(service.url, "m"), [ROW])
        with pytest.raises(EvaluationError, match="no http"):
            Judge("file:///etc/passwd", "m")

    def test_axes(self, service: Any) -> None:
        service.replies = ['{"score": 3}']
        rows = [
            {**ROW, "id": "generic-0", "group": "generic"},
            {**ROW, "id": "consistency-0.1", "group": "consistency"},
            {**ROW, "id": "consistency-0.2", "group": "consistency", "response": "Some cat."},
            {**ROW, "id": "temporal-0", "group": "temporal"},
        ]
        verdicts = judge_all(Judge(service.url, "m"), rows)
        assert [verdict["axis"] for verdict in verdicts] == [
            "correctness",
            "detail",
            "context",
            "consistency",
            "temporal",
        ]
        assert set(AXES) == {verdict["axis"] for verdict in verdicts}
        asked = service.requests[3][2]["messages"][0]["content"]
        assert "Some cat." in asked and "A dog runs." in asked
        scores = score_verdicts(verdicts)
        assert scores["mean_score"] == 3 and scores["axes"]["detail"] == {"count": 1, "unjudged": 0, "score": 3.0}
        assert "whole number" in judge_prompt(ROW, "detail")


class TestScores:
    @pytest.mark.parametrize(
        ("response", "letter"),
        [
            ("B) a dog", "B"),
            ("(c) it", "C"),
            ("A.", "A"),
            ("d", "D"),
            ("Because of the rain", None),
            ("It is a dog.", "B"),
            # An article in front looks like a letter, and is taken as one.
            ("a cat or a dog", "A"),
            ("one cat or one dog", None),
            ("", None),
        ],
    )
    def test_letters(self, response: str, letter: Any) -> None:
        assert chosen_letter(response, ("a cat", "a dog")) == letter

    def test_choices(self) -> None:
        rows = [
            {"group": "x", "answer": "A", "response": "A)", "options": []},
            {"group": "x", "answer": "B", "response": "A)", "options": []},
            {"group": "y", "answer": "C", "response": "(C", "options": []},
            {"group": "y", "answer": "C", "response": "C", "options": []},
            {"group": "y", "answer": "C", "response": "?", "options": []},
            {"group": "y", "answer": "C", "response": "c.", "options": []},
        ]
        found = score_choices(rows)
        assert found["accuracy"] == pytest.approx(4 / 6) and found["unreadable"] == 1
        assert found["groups"]["y"] == {"accuracy": 0.75, "count": 4}
        assert found["mean_of_groups"] == pytest.approx(0.625)
        with pytest.raises(EvaluationError):
            score_choices([])

    def test_verdicts(self) -> None:
        rows = [{"axis": None, "score": 4, "pred": "yes"}, {"axis": None, "score": 1, "pred": "no"}]
        found = score_verdicts([*rows, {"axis": None, "score": None, "pred": None}])
        assert found["axes"]["answer"] == {"count": 2, "unjudged": 1, "score": 2.5, "accuracy": 0.5}
        with pytest.raises(EvaluationError):
            score_verdicts([])


class TestCommands:
    def _run(self, *words: Any) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    def test_answer_judge_and_score(self, videos: Path, tmp_path: Path, service: Any) -> None:
        model, processor = build()
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        table = tmp_path / "test.csv"
        table.write_text(",question,answer,video_name,question_id\n0,Who runs?,dog,clip,q1\n1,Where?,left,clip,q2\n")
        answers, verdicts = tmp_path / "a.jsonl", tmp_path / "j.jsonl"
        options = ("--annotations", table, "--videos", videos, "-m", tmp_path / "model", "--frames", 2, "--limit", 1)
        words = ("answer", "--task", "open", *options, "-o", answers, "--device", "cpu")
        # A process of its own: the command makes its model known to the whole process.
        command = [sys.executable, "-m", "tokensieve.evaluate", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert "1 answers in" in done.stdout
        assert self._run("judge", "-i", answers, "--url", service.url, "--judge", "m", "-o", verdicts).exit_code == 0
        scored = json.loads(self._run("score", "-i", verdicts).output)
        assert scored["axes"]["answer"] == {"count": 1, "unjudged": 0, "score": 4.0, "accuracy": 1.0}
