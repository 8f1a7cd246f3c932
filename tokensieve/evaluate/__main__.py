"""``python -m tokensieve.evaluate answer | judge | score``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tokensieve.errors import TokensieveError

app = typer.Typer(help="Evaluation protocols of PPLLaVA.", no_args_is_help=True, pretty_exceptions_enable=False)

Input = Annotated[Path, typer.Option("--input", "-i", help="Answers, JSON lines.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write, JSON lines.")]


@app.command("answer")
def answer_command(
    task: Annotated[str, typer.Option(help="mvbench, videomme, activitynet, open (MSVD, MSRVTT) or vcg.")],
    annotations: Annotated[Path, typer.Option(help="Annotation file or folder.")],
    videos: Annotated[Path, typer.Option(help="Folder of the videos.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of the model.")],
    output: Output,
    subtitles: Annotated[Path | None, typer.Option(help="Folder of SRT files (Video-MME).")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of every video instead of the protocol's.")] = None,
    limit: Annotated[int | None, typer.Option(help="First questions only.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Let a model answer; questions that are answered in the output already are left alone."""
    import dataclasses

    from tokensieve.evaluate.answering import answer_all
    from tokensieve.evaluate.protocols import protocol_for
    from tokensieve.evaluate.questions import load_questions
    from tokensieve.load import load_model
    from tokensieve.models.ppllava import register
    from tokensieve.models.ppllava.host import register_host

    register()
    register_host()
    questions = load_questions(task, annotations, subtitles)[:limit]
    changes = {} if frames is None else {"frames": frames}
    if frames is not None:
        questions = [dataclasses.replace(question, frames=None) for question in questions]
    loaded, processor = load_model(model, dtype, device, None, False)
    rows = answer_all(loaded, processor, protocol_for(task, **changes), questions, videos, output)
    typer.echo(f"{len(rows)} answers in {output}")


@app.command("judge")
def judge_command(
    input_file: Input,
    url: Annotated[str, typer.Option(help="OpenAI-compatible address, such as http://127.0.0.1:8000/v1.")],
    judge: Annotated[str, typer.Option(help="Name of the judging model there.")],
    output: Output,
    key_file: Annotated[Path | None, typer.Option(help="File with the key of the service.")] = None,
) -> None:
    """Have open answers graded."""
    from tokensieve.evaluate.answering import read_answers
    from tokensieve.evaluate.judging import Judge, judge_all

    key = None if key_file is None else key_file.read_text(encoding="utf-8").strip()
    verdicts = judge_all(Judge(url, judge, key), read_answers(input_file))
    output.write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts), encoding="utf-8")
    typer.echo(f"{len(verdicts)} verdicts in {output}")


@app.command("score")
def score_command(input_file: Input) -> None:
    """Accuracies of multiple-choice answers, or scores of verdicts, as JSON."""
    from tokensieve.evaluate.answering import read_answers
    from tokensieve.evaluate.scoring import score_choices, score_verdicts

    rows = read_answers(input_file)
    judged = bool(rows) and "score" in rows[0]
    typer.echo(json.dumps(score_verdicts(rows) if judged else score_choices(rows), indent=2))


def main() -> None:
    """Run the commands; what the user can put right takes one line."""
    try:
        app()
    except TokensieveError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
