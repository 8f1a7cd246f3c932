"""From questions to answers of a model, one JSON line each, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokensieve.evaluate.protocols import Protocol
from tokensieve.evaluate.questions import EvaluationError, Question, Subtitle
from tokensieve.train.frames import central_indices, folder_pictures, frames_at, video_facts

__all__ = ["answer", "answer_all", "read_answers", "sampled_frames", "shown_subtitles"]


def sampled_frames(question: Question, path: Path, count: int) -> tuple[NDArray[np.uint8], list[float]]:
    """Frames of a question's video by the formula of the evaluation, and their times in seconds.

    Parameters
    ----------
    question : Question
        Range and rate.
    path : Path
        Video file, or folder of pictures.
    count : int
        Frames.

    Returns
    -------
    frames : np.ndarray
        ``[count, H, W, 3]``, 8 bits.
    times : list of float
        Seconds after the first frame.
    """
    if path.is_dir():
        total, rate = len(folder_pictures(path)), question.rate or 1.0
    else:
        total, rate = video_facts(path)
    wanted = central_indices(total - 1, count, fps=rate, start=question.start, end=question.end)
    wanted = np.clip(wanted, 0, total - 1)
    return frames_at(path, wanted), [float(index) / rate for index in wanted]


def shown_subtitles(subtitles: Iterable[Subtitle], times: Iterable[float]) -> list[Subtitle]:
    """Subtitles whose span holds a sampled frame, each once, in order."""
    moments = list(times)
    return [line for line in subtitles if any(line.start <= moment <= line.end for moment in moments)]


def answer(
    model: Any,
    processor: Any,
    protocol: Protocol,
    question: Question,
    frames: NDArray[np.uint8],
    shown: Iterable[Subtitle] = (),
) -> str:
    """Greedy answer to one question, without the words that began it.

    Parameters
    ----------
    model, processor
        A PPLLaVA model, or another that takes videos.
    protocol : Protocol
        Prompt.
    question : Question
        What is asked.
    frames : np.ndarray
        ``[T, H, W, 3]``.
    shown : iterable of Subtitle
        Subtitles of these frames.

    Returns
    -------
    str
    """
    from tokensieve.models.ppllava.processing import PPLlavaProcessor

    content = [{"type": "video"}, {"type": "text", "text": protocol.text(question, list(shown))}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if protocol.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": protocol.system}]})
    prompt = str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)) + protocol.prime
    extra: dict[str, Any] = {"do_sample_frames": False}
    if isinstance(processor, PPLlavaProcessor):
        extra["questions"] = [protocol.for_text_tower(question)]
    inputs = processor(text=[prompt], videos=[frames], return_tensors="pt", **extra)
    moved = {
        name: value.to(model.device, model.dtype) if name.startswith("pixel_values") else value.to(model.device)
        for name, value in inputs.items()
    }
    with torch.no_grad():
        ids = model.generate(**moved, max_new_tokens=protocol.new_tokens, do_sample=False)
    tokenizer = getattr(processor, "tokenizer", processor)
    return str(tokenizer.decode(ids[0, moved["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def answer_all(
    model: Any,
    processor: Any,
    protocol: Protocol,
    questions: Iterable[Question],
    videos: Path,
    output: Path,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Answer questions and write one JSON line each; those in the file already are not asked again.

    Parameters
    ----------
    model, processor, protocol
        See `answer`.
    questions : iterable of Question
        What is asked.
    videos : Path
        Folder of videos.
    output : Path
        JSON lines with ``id``, ``group``, ``question``, ``answer`` (the expected one) and ``response``.
    progress : callable, optional
        Called with the number of questions done.

    Returns
    -------
    list of dict
        All lines of the file.
    """
    done = read_answers(output) if output.is_file() else []
    known = {row["id"] for row in done}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        for number, question in enumerate(questions, 1):
            if question.id not in known:
                frames, times = sampled_frames(question, question.locate(videos), question.frames or protocol.frames)
                shown = shown_subtitles(question.subtitles, times)
                row = {
                    "id": question.id,
                    "group": question.group,
                    "question": question.question,
                    "options": list(question.options),
                    "answer": question.answer,
                    "response": answer(model, processor, protocol, question, frames, shown),
                }
                file.write(json.dumps(row) + "\n")
                file.flush()
                done.append(row)
            if progress is not None:
                progress(number)
    return done


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Lines of an answer file; a last line that was torn by a crash is left out.

    Raises
    ------
    EvaluationError
        If the file cannot be read or another line is no JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EvaluationError(f"The answers {path} cannot be read ({error.strerror}); check the path.") from error
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) - 1:
                # What follows must begin on a line of its own.
                path.write_text("".join(f"{whole}\n" for whole in lines[:-1]), encoding="utf-8")
                break
            raise EvaluationError(f"Line {number + 1} of {path} is no JSON ({error}); remove it.") from error
    return rows
