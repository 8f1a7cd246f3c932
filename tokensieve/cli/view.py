"""``tokensieve view``: a page or picture of what a method keeps of a video."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tokensieve.cli import _options as options
from tokensieve.cli._console import note, out, quiet_transformers, show_json
from tokensieve.cli._progress import step
from tokensieve.errors import MethodError, TokensieveError

_PAGE, _PICTURE = (".html", ".htm"), (".png",)


def view(
    video: options.Video,
    output: Annotated[
        list[Path],
        typer.Option("--output", "-o", help="File to write: .html or .png; repeat for both.", show_default=False),
    ],
    question: Annotated[
        str, typer.Option("--question", "-q", help="What to ask about the video.")
    ] = "What happens in this video?",
    model: options.Model = None,
    method: options.MethodName = "vidcom2",
    retention: options.Retention = None,
    settings: options.Settings = None,
    frames: options.Frames = 32,
    fps: options.FramesPerSecond = None,
    start: options.Start = None,
    end: options.End = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")] = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attn: options.Attention = None,
    seed: options.Seed = None,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Show what a method keeps of every frame, as an HTML page or a PNG picture."""
    from tokensieve.cli import _common as common

    for path in output:
        _check_output(path)
    common.check_question(question)
    if max_new_tokens < 1:
        raise MethodError(f"--max-new-tokens must be 1 or more, not {max_new_tokens}.")
    methods = common.parse_methods(method, retention, settings, seed)
    show = not no_progress
    with quiet_transformers():
        common.check_model(model, methods, trust_remote_code=trust_remote_code)
        clip = common.read_frames(video, frames, fps, start, end, show)
        loaded = common.open_model(model, dtype, device, attn, trust_remote_code, show)
        prompt = common.make_prompt(loaded, clip, question, methods)
        answer, run = common.run_methods(loaded, prompt.on(loaded.model), methods, max_new_tokens, show)
    report = run.report
    remarks = common.remarks(report)
    for sentence in remarks:
        note(sentence)
    from tokensieve.view import ViewData, write_html, write_png

    caution = ["The model has random weights, so its answer means nothing."] if loaded.random_weights else []
    data = ViewData.of_run(
        run,
        clip.frames,
        None if clip.info.is_image else clip.timestamps,
        processor=loaded.processor,
        label=_label(video),
        question=question,
        answers={common.title_of(methods): answer.text},
        note=" ".join(caution + [sentence[:1].upper() + sentence[1:] for sentence in prompt.notes + remarks]),
    )
    with step("drawing", show):
        for path in output:
            (write_html if path.suffix.lower() in _PAGE else write_png)(data, path)
    if as_json:
        show_json(
            {
                "files": [str(path) for path in output],
                "video": video,
                "question": question,
                "model": loaded.name,
                "random_weights": loaded.random_weights,
                "methods": common.describe_methods(methods),
                "answer": answer.text,
                "report": report.to_dict(full=True),
            }
        )
        return
    for path in output:
        out.print(Text(str(path)), soft_wrap=True)


def _check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done."""
    if path.suffix.lower() not in _PAGE + _PICTURE:
        raise TokensieveError(f"{path} must end in .html or .png, which says what to write.")
    if path.is_dir():
        raise TokensieveError(f"{path} is a folder; give the name of a file in it.")
    if not path.parent.is_dir():
        raise TokensieveError(f"The folder {path.parent} does not exist; create it or choose another.")
    if not os.access(path.parent, os.W_OK):
        raise TokensieveError(f"Nothing can be written to the folder {path.parent}; choose another.")


def _label(video: str) -> str:
    """File name of a path, or the address without its query."""
    return video.partition("?")[0] if "://" in video else Path(video).name
