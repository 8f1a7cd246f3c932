"""PPLLaVA trained with the user's commands alone: clips, SFT, a kill, a resumed run, DPO, then `bench` and `ask`.

    python -m benchmarks.ppllava_end_to_end --work FOLDER [--clips 600] [--test-clips 150]

Clips are made by `tokensieve world make`, in the public JSON formats. `tokensieve train ppllava` runs the two recipes
of the world; the first run is killed (SIGKILL) behind a checkpoint and resumed. Measured on clips that no training
has seen: accuracy by `tokensieve bench` before training, after SFT and after DPO; and, for SFT and DPO, the share
of held-out pairs whose right answer is the likelier one, with the mean difference of both log-probabilities.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.results import RESULTS, machine, show, write
from tokensieve.bench.statistics import accuracy, mcnemar
from tokensieve.models.ppllava import register
from tokensieve.train import Collator, DataSource, RecordDataset, read_config
from tokensieve.train.check import load_samples
from tokensieve.train.dpo import answer_log_probabilities
from tokensieve.train.run import load_parts
from tokensieve.world import bundled
from tokensieve.world.files import PREFERENCES, QUESTIONS

__all__ = ["main"]

RECIPES = Path(__file__).resolve().parents[1] / "tokensieve" / "train" / "recipes"
FRAMES = 8


def command(*words: Any) -> list[str]:
    """A command line of tokensieve."""
    return [sys.executable, "-m", "tokensieve.cli", *map(str, words)]


def run(*words: Any) -> str:
    """Run a command of tokensieve to its end; its output."""
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def recipe(work: Path, stage: str) -> Path:
    """The recipe of a stage, copied to the folder of the data."""
    path = work / f"ppllava-world-{stage}.yaml"
    path.write_bytes((RECIPES / path.name).read_bytes())
    return path


def train_and_kill(path: Path, output: Path, settings: Sequence[str]) -> tuple[int, int]:
    """Start a training, kill it behind its first checkpoint, and resume it; a finished one is left alone.

    Returns
    -------
    killed, steps : int
        Last logged update of the killed run, and updates in all.
    """
    words = ["train", "ppllava", "-c", path, "--no-progress"]
    for setting in settings:
        words += ["--set", setting]
    record = output / "killed.json"
    if record.is_file() and (output / "model").is_dir():
        killed, steps = json.loads(record.read_text())
        return killed, steps
    log = output.with_suffix(".log")
    with log.open("w") as sink:
        process = subprocess.Popen(command(*words), stdout=sink, stderr=subprocess.STDOUT)
        metrics = output / "metrics.jsonl"
        while process.poll() is None and not (_checkpoints(output) and _last_step(metrics) > min(_checkpoints(output))):
            time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(f"The training ended before it could be killed, see {log}; take more clips.")
        killed = _last_step(metrics)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run(*words, "--resume")
    record.write_text(json.dumps([killed, _last_step(metrics)]))
    return killed, _last_step(metrics)


def _checkpoints(output: Path) -> list[int]:
    """Updates of the complete checkpoints in a folder."""
    return [int(folder.name.split("-")[1]) for folder in output.glob("checkpoint-*") if _complete(folder)]


def _complete(folder: Path) -> bool:
    return (folder / "trainer_state.json").is_file()


def _last_step(metrics: Path) -> int:
    rows = metrics.read_text().splitlines() if metrics.is_file() else []
    return max((json.loads(row)["step"] for row in rows), default=0)


def bench(model: Path, data: Path, folder: Path) -> dict[str, bool]:
    """Whether the model answers each question right, as `tokensieve bench` finds."""
    run(
        *("bench", "--model", model, "--data", data, "--methods", "random", "-r", "0.5", "--frames", FRAMES),
        *("--prompt", "open", "--workers", 1, "-o", folder, "--no-progress"),
    )
    right: dict[str, bool] = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        unit = json.loads(line).get("unit", {})
        if unit.get("setting") == "full model":
            right |= {name: answer["right"] for name, answer in unit["answers"].items()}
    return right


@torch.no_grad()
def preferences(model: Path, pairs: Path) -> list[float]:
    """Log-probability of the right answer minus that of the other one, for every pair."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    collator = Collator(AutoProcessor.from_pretrained(model), pairs=True)
    samples, _ = load_samples([DataSource(str(pairs))])
    dataset = RecordDataset(samples, FRAMES, random_frames=False)
    found: list[float] = []
    for start in range(0, len(dataset), 8):
        batch = collator([dataset[number] for number in range(start, min(start + 8, len(dataset)))])
        labels = batch.pop("labels")
        total, _ = answer_log_probabilities(loaded(**batch).logits, labels)
        right, wrong = total.view(2, -1)
        found += (right - wrong).tolist()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppllava_end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for clips, models and results of commands")
    parser.add_argument("--clips", type=int, default=600, help="for training, 4 questions each")
    parser.add_argument("--test-clips", type=int, default=150)
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="FIELD=VALUE", help="of both recipes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    arguments.base_digest = hashlib.sha256((bundled() / "model.safetensors").read_bytes()).hexdigest()[:12]
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    test = work / "test"
    sizes = ("--frames", FRAMES, "--questions", 4, "--no-progress")
    run("world", "make", work / "world", "--split", "train", "--clips", arguments.clips, *sizes)
    run("world", "make", test, "--split", "test", "--clips", arguments.test_clips, *sizes)
    models = {"before": work / "start", "SFT": work / "world-sft" / "model", "DPO": work / "world-dpo" / "model"}
    model, processor = load_parts(read_config(recipe(work, "sft")))
    model.save_pretrained(models["before"])
    processor.save_pretrained(models["before"])
    killed = {
        stage: train_and_kill(recipe(work, stage), work / f"world-{stage}", arguments.settings)
        for stage in ("sft", "dpo")
    }
    register()
    right = {name: bench(folder, test / QUESTIONS, work / f"bench-{name}") for name, folder in models.items()}
    gaps = {name: preferences(folder, test / PREFERENCES) for name, folder in models.items()}
    question = json.loads((test / QUESTIONS).read_text().splitlines()[0])
    said = run(
        *("ask", test / question["video"], question["question"], "--model", models["DPO"], "--method", "random"),
        *("-r", "1.0", "--frames", FRAMES, "--json", "--no-progress"),
    )
    asked = {
        "question": question["question"],
        "right": question["answer"],
        "ask": json.loads(said)["compressed"]["answer"],
    }
    return _report(arguments, right, gaps, killed, asked)


def _report(
    arguments: argparse.Namespace,
    right: dict[str, dict[str, bool]],
    gaps: dict[str, list[float]],
    killed: dict[str, tuple[int, int]],
    asked: dict[str, str],
) -> int:
    rows = []
    earlier = ""
    for name, marks in right.items():
        gap = gaps[name]
        clips: dict[str, list[bool]] = {}
        for key, mark in marks.items():
            clips.setdefault(key.split("/")[0], []).append(mark)
        found = accuracy([(sum(clip), len(clip)) for clip in clips.values()])
        cells = ["", "", ""]
        if earlier:
            before = right[earlier]
            won = sum(marks[key] and not before[key] for key in marks)
            lost = sum(before[key] and not marks[key] for key in marks)
            pairs = zip(gap, gaps[earlier], strict=True)
            cells = [
                f"{mcnemar(lost, won):.2g}",
                f"{sum(now > then for now, then in pairs) / len(gap):.1%}",
                f"{(sum(gap) - sum(gaps[earlier])) / len(gap):+.2f}",
            ]
        ordered = f"{sum(value > 0 for value in gap) / len(gap):.1%}"
        mean = f"{sum(gap) / len(gap):.2f}"
        rows.append(
            [name, f"{found.value:.1%}", f"{found.low:.1%} to {found.high:.1%}", cells[0], ordered, mean, *cells[1:]]
        )
        earlier = name
    columns = (
        *("model", "accuracy (bench)", "95 %", "p against the row above", "pairs in order", "mean gap"),
        *("pairs whose gap grew", "growth of the gap"),
    )
    digest = arguments.base_digest
    title = "PPLLaVA trained with the commands of tokensieve"
    show(title, columns, rows)
    number = len(next(iter(right.values())))
    notes = (
        f"{number} questions and pairs about {arguments.test_clips} clips that no training has seen; 64 visual tokens.",
        "gap: log-probability of the right answer minus that of the other one; in order: above 0.",
        *(
            f"{stage.upper()}: killed behind update {last}, resumed, {steps} updates in all."
            for stage, (last, steps) in killed.items()
        ),
        f"ask, with the model of DPO: '{asked['question']}' -> '{asked['ask']}' (right: '{asked['right']}').",
        "95 %: Wilson's interval for the effective number of questions; p: exact McNemar test.",
        f"start: the bundled pair and a video LLM with the SHA-256 {digest}.",
    )
    payload = {
        "machine": machine(),
        "settings": {key: str(value) for key, value in vars(arguments).items() if key not in ("work", "output")},
        "right": right,
        "gaps": gaps,
        "killed": killed,
        "asked": asked,
    }
    path = write(arguments.output, "ppllava_end_to_end", payload, title, [("", columns, rows)], notes)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
