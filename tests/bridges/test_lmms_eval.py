"""lmms-eval end to end on a task of our own clips, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bridge_media import write_video

import tokensieve
from benchmarks import lmms_world
from tokensieve.hosts import tiny
from tokensieve.prompt import build_prompt
from tokensieve.video import read_clip

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-lmms"
PYTHON = Path(os.environ.get("TOKENSIEVE_LMMS_PYTHON") or ENVIRONMENT / "bin" / "python")
NEW_TOKENS = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.is_file(),
        reason=f"there is no environment with lmms-eval at {PYTHON}; run `make test-lmms`",
    ),
]

TASK = """\
task: tokensieve_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
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
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""

UTILS = """\
def visual(doc):
    return [doc["video"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def score(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cwd / "hub")}
    return subprocess.run(
        [PYTHON, "-m", "lmms_eval", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **offline},
        timeout=400,
        check=False,
    )


def answers(loaded: tuple[Any, Any], items: list[dict[str, Any]]) -> tuple[list[str], float]:
    """What the library itself answers, and the share of tokens that it keeps."""
    model, processor = loaded
    found, kept, before = [], 0, 0
    for item in items:
        inputs = build_prompt(processor, read_clip(item["video"], 4), item["question"]).on(model)
        with tokensieve.compress(model, "vidcom2", retention=0.25) as attached:
            produced = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = produced[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
        kept += attached.report.patches.entered
        before += attached.report.patches.uncompressed
    return found, kept / before


def test_a_local_task_scores_what_the_library_answers(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    questions = ("What moves?", "Which shape is in front of all the others at the end?", "Where?")
    items = []
    for number in range(7):
        # Clips of two lengths, so that some cannot share a batch.
        video = write_video(tmp_path / f"{number}.mp4", count=8 if number % 3 else 3, seed=number)
        items.append({"video": str(video), "question": questions[number % 3]})
    truth, share = answers(loaded, items)
    for number, item in enumerate(items):
        item["answer"] = truth[number] if number not in (1, 4) else "something else"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl", new_tokens=NEW_TOKENS))
    (tasks / "utils.py").write_text(UTILS)
    model = f"pretrained={tiny.cached('llava_onevision')},method=vidcom2,retention=0.25,max_frames_num=4"
    done = run(
        *("--model", "tokensieve", "--model_args", model, "--include_path", tasks, "--tasks", "tokensieve_local"),
        *("--batch_size", 3, "--device", "cpu", "--output_path", tmp_path / "results", "--log_samples"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").rglob("*results.json")
    results = json.loads(path.read_text())
    assert results["results"]["tokensieve_local"]["exact,none"] == pytest.approx(5 / 7)
    throughput = results["throughput"]
    assert throughput["avg_retention_achieved"] == pytest.approx(share)
    assert throughput["avg_visual_tokens"] < throughput["avg_visual_tokens_before"]
    assert throughput["total_gen_tokens"] == NEW_TOKENS * len(items)
    assert all(throughput[f"avg_seconds_{stage}"] > 0 for stage in ("encode", "compress", "prefill", "decode"))
    (samples,) = (tmp_path / "results").rglob("*samples*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [one["filtered_resps"] for one in sorted(logged, key=lambda one: one["doc_id"])] == truth


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from lmms_eval.models import get_model\n"
        "from tokensieve.errors import TokensieveError\n"
        "cls = get_model('tokensieve')\n"
        "for line in sys.argv[1:]:\n"
        "    try:\n"
        "        cls.create_from_arg_string(line)\n"
        "        print('made')\n"
        "    except TokensieveError as error:\n"
        "        print(error)\n"
    )
    base = f"pretrained={tiny.cached('llava_onevision')},device=cpu"
    lines = [
        f"{base},method=fastv:layer=3,retention=0.5",
        f"{base},method=fastv,layer=3",
        f"{base},method=fastv,layer=40",
        f"{base},method=vidcon2",
        f"{base},retention=2",
        f"{base},batch_size=auto",
        f"{base},colour=red",
        "pretrained=missing/folder/here,device=cpu",
    ]
    done = subprocess.run(
        [PYTHON, "-c", script, *lines],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line][-len(lines) :]
    wanted = [
        "made",
        "made",
        "layer 40",
        "did you mean vidcom2",
        "(0, 1]",
        "'auto'",
        "no option 'colour'",
        "does not exist",
    ]
    for line, message in zip(found, wanted, strict=True):
        assert message in line


@pytest.mark.parametrize("method", ["none", "vidcom2"])
def test_the_same_answers_as_bench_on_clips_of_the_world(method: str, tmp_path: Path) -> None:
    retention = 1.0 if method == "none" else 0.25
    found = lmms_world.compare(PYTHON, tmp_path, 3, method, retention, 4)
    assert found["different"] == [] and found["questions"] == 6
    assert found["accuracy_lmms_eval"] == found["accuracy_bench"]
    throughput, tokens = found["throughput_lmms_eval"], found["tokens_bench"]
    assert throughput["avg_visual_tokens_before"] == 16 * 36
    assert throughput["avg_retention_achieved"] == pytest.approx(retention, abs=0.01)
    # Newlines behind the clip are no visual tokens in either count.
    assert tokens["entered"] == pytest.approx(throughput["avg_visual_tokens"], abs=0.5)
