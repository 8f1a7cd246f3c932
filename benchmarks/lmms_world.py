"""lmms-eval and `tokensieve bench` on the same clips and questions, with the bundled model: the same answers?

    make test-lmms                                        # makes .venv-lmms, the environment of lmms-eval
    python -m benchmarks.lmms_world [--clips 60] [--method vidcom2] [--retention 0.25]

Clips of the project's own world are written as mp4 files with their questions. lmms-eval answers them as a task of
its own (`--include_path`), in its own environment and through its entry points; `tokensieve bench` answers the same
file. Answers are compared question by question. Models and clips are read from disk; nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, machine, show, write
from tokensieve.bench.asking import MOST_NEW_TOKENS
from tokensieve.bench.settings import FULL, RANDOM, Setting
from tokensieve.measure.text import in_percent
from tokensieve.world.bundled import bundled
from tokensieve.world.files import write_world

__all__ = ["compare", "main", "run_bench", "run_lmms", "write_task"]

ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-lmms"
FRAMES = 16
TASK = """\
task: tokensieve_world
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: {new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
from pathlib import Path

from tokensieve.bench.asking import normalised

FOLDER = Path({folder!r})


def visual(doc):
    return [str(FOLDER / doc["video"])]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {{"accuracy": float(normalised(results[0]) == normalised(doc["answer"]))}}
"""


def write_task(folder: Path, questions: Path) -> Path:
    """A task of lmms-eval over a questions file of `tokensieve world make`; its folder, for ``--include_path``."""
    target = folder / "tasks"
    target.mkdir()
    (target / "world.yaml").write_text(TASK.format(questions=questions, new_tokens=MOST_NEW_TOKENS), encoding="utf-8")
    (target / "utils.py").write_text(UTILS.format(folder=str(questions.parent)), encoding="utf-8")
    return target


def run_lmms(
    python: Path, folder: Path, tasks: Path, method: str, retention: float, batch_size: int
) -> tuple[dict[str, Any], dict[int, str]]:
    """Run lmms-eval on a task; its results, and the answers by the number of the question.

    Raises
    ------
    RuntimeError
        If it ends without results; with status 0 it does that, too.
    """
    output = folder / f"lmms-{method}"
    model = f"pretrained={bundled()},method={method},retention={retention},max_frames_num={FRAMES},dtype=float32"
    words = ["--model", "tokensieve", "--model_args", model, "--include_path", tasks, "--tasks", "tokensieve_world"]
    words += ["--batch_size", batch_size, "--device", "cpu", "--output_path", output, "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [python, "-m", "lmms_eval", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **offline},
        check=False,
    )
    found = [*output.rglob("*results.json")], [*output.rglob("*samples*.jsonl")]
    if done.returncode or not all(found):
        raise RuntimeError(f"lmms-eval ended with status {done.returncode} and no results: {done.stderr[-2000:]}")
    samples = [json.loads(line) for line in found[1][0].read_text(encoding="utf-8").splitlines()]
    results: dict[str, Any] = json.loads(found[0][0].read_text(encoding="utf-8"))
    return results, {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


def run_bench(
    folder: Path, questions: Path, method: str, retention: float
) -> tuple[dict[str, str], dict[str, Any], dict[str, float]]:
    """Run `tokensieve bench` on a questions file; answers by id, which were right, and tokens before and after."""
    output = folder / f"bench-{method}"
    words = ["--data", questions, "--methods", method, "--retention", retention, "--frames", FRAMES, "--output", output]
    # The full model runs in every comparison, so any method shows it.
    words[3] = RANDOM if method == "none" else method
    words += ["--prompt", "open", "--dtype", "float32", "--device", "cpu", "--workers", 1, "--no-progress"]
    subprocess.run(
        [sys.executable, "-m", "tokensieve.cli", "bench", *map(str, words)],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=folder,
    )
    lines = [json.loads(line) for line in (output / "journal.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    units = [line["unit"] for line in lines if "unit" in line]
    asked = Setting(FULL) if method == "none" else Setting(method, retention)
    wanted = [unit for unit in units if unit["setting"] == asked.key]
    answers = {key: one for unit in wanted for key, one in unit["answers"].items()}
    number = len(answers)
    tokens = {
        name: sum(unit["tokens"][name] * len(unit["answers"]) for unit in wanted) / number
        for name in wanted[0]["tokens"]
    }
    given = {key: one["given"] for key, one in answers.items()}
    return given, {key: bool(one["right"]) for key, one in answers.items()}, tokens


def compare(python: Path, folder: Path, clips: int, method: str, retention: float, batch_size: int) -> dict[str, Any]:
    """Both harnesses on the same questions."""
    questions = write_world(folder / "world", "test", clips)
    asked = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    (folder / method).mkdir()
    results, theirs = run_lmms(python, folder, write_task(folder / method, questions), method, retention, batch_size)
    ours, right, tokens = run_bench(folder, questions, method, retention)
    different = [
        {"id": row["id"], "lmms-eval": theirs[number].strip(), "bench": ours[row["id"]]}
        for number, row in enumerate(asked)
        if theirs[number].strip() != ours[row["id"]]
    ]
    return {
        "method": method,
        "retention": retention,
        "batch_size": batch_size,
        "clips": clips,
        "questions": len(asked),
        "accuracy_lmms_eval": results["results"]["tokensieve_world"]["accuracy,none"],
        "accuracy_bench": sum(right.values()) / len(right),
        "throughput_lmms_eval": results["throughput"],
        "tokens_bench": tokens,
        "different": different,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, 1 when an answer differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lmms_world", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--method", nargs="+", default=["none", "vidcom2"])
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--python", type=Path, default=ENVIRONMENT / "bin" / "python", help="where lmms-eval is")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tokensieve-lmms-") as place:
        found = [
            compare(
                arguments.python,
                Path(place),
                arguments.clips,
                method,
                1.0 if method == "none" else arguments.retention,
                arguments.batch_size,
            )
            for method in arguments.method
        ]
    columns = ("method", "retention", "questions", "lmms-eval", "tokensieve bench", "answers that differ", "tokens")
    rows = [
        (
            one["method"],
            f"{one['retention']:g}",
            str(one["questions"]),
            in_percent(one["accuracy_lmms_eval"]),
            in_percent(one["accuracy_bench"]),
            str(len(one["different"])),
            f"{one['throughput_lmms_eval']['avg_visual_tokens']:.1f} "
            f"of {one['throughput_lmms_eval']['avg_visual_tokens_before']:.1f}",
        )
        for one in found
    ]
    title = "The bundled model in lmms-eval 0.7.3 and in `tokensieve bench`, on the same clips and questions"
    show(title, columns, rows)
    notes = (
        "Accuracy as each of them counts it; answers are compared word for word, weights in float32.",
        f"lmms-eval with batches of {arguments.batch_size}; bench asks the questions of a clip together.",
    )
    path = write(
        arguments.output, "lmms_world", {"machine": machine(), "runs": found}, title, [("", columns, rows)], notes
    )
    print(f"written: {path}")
    return 1 if any(one["different"] for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
