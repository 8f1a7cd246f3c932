"""Prompts made one by one and joined are the batch that the processor itself would have made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bridge_media import write_video
from PIL import Image

from tokensieve.bridges.chat import Turn, build_chats
from tokensieve.bridges.joining import can_join, join_prompts
from tokensieve.errors import HostError
from tokensieve.hosts import tiny
from tokensieve.prompt import Prompt
from tokensieve.video import Clip, read_clip


@pytest.fixture(scope="module")
def clips(folder: Path) -> dict[str, Clip]:
    """Two videos of the same length in portrait and landscape, and three pictures."""
    found = {
        "wide": read_clip(write_video(folder / "wide.mp4", seed=3), 4),
        "tall": read_clip(write_video(folder / "tall.mp4", size=(96, 64), seed=4), 4),
    }
    for name, size in (("red", (80, 60)), ("blue", (80, 60)), ("long", (200, 60))):
        path = folder / f"{name}.png"
        Image.new("RGB", size, name if name != "long" else "green").save(path)
        found[name] = read_clip(path, 1)
    return found


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("shown", [("wide", "tall", "wide"), ("red", "blue", "red"), (None, None, None)])
def test_joined_is_what_the_processor_makes(family: str, shown: tuple[str | None, ...], clips: dict[str, Clip]) -> None:
    _, processor = tiny.load(family)
    questions = ("What?", "Which shape is in front of all the others at the end of the clip?", "Who moves where?")
    chats = [
        [Turn("user", (question,) if name is None else (clips[name], question))]
        for name, question in zip(shown, questions, strict=True)
    ]
    single = [build_chats(processor, [chat]) for chat in chats]
    assert len({prompt.tokens for prompt in single}) > 1
    joined = join_prompts(single, processor.tokenizer.pad_token_id)
    wanted = build_chats(processor, chats)
    assert joined.inputs.keys() == wanted.inputs.keys()
    for name, value in wanted.inputs.items():
        assert torch.equal(joined.inputs[name], value), name
    assert joined.as_video == wanted.as_video and joined.notes == wanted.notes


def test_what_does_not_fit_is_refused(clips: dict[str, Clip]) -> None:
    _, processor = tiny.load("llava_onevision")
    video, picture, tiles, text = (
        build_chats(processor, [[Turn("user", (*shown, "What?"))]])
        for shown in ([clips["wide"]], [clips["red"]], [clips["long"]], [])
    )
    assert can_join(video, video) and join_prompts([video], 0) is video
    for one, other in ((video, picture), (picture, tiles), (video, text)):
        assert not can_join(one, other) and not can_join(other, one)
        with pytest.raises(HostError, match="one by one"):
            join_prompts([one, other], 0)
    # An input nobody knows here that runs alongside the tokens could need a padding of its own.
    strange = Prompt({**text.inputs, "strange": torch.zeros(1, text.tokens)}, False)
    assert not can_join(strange, strange)
