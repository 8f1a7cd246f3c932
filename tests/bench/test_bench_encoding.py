"""Features encoded once give exactly what every method would have encoded itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_items import item, loaded
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tokensieve.bench.asking import answer
from tokensieve.bench.data import clip_of
from tokensieve.bench.encoding import Collector, encodes_itself, given, record
from tokensieve.bench.session import Session
from tokensieve.bench.settings import expand
from tokensieve.core.registry import parse
from tokensieve.core.runtime import Run
from tokensieve.hosts import host_for, tiny
from tokensieve.models.ppllava import assemble, assemble_processor, register
from tokensieve.models.ppllava.host import register_host
from tokensieve.prompt import build_prompt
from tokensieve.world import bundled, items

SHARED = ("none", "vidcom2:retention=0.3", "hiprune:retention=0.4", "fastv:retention=0.4,layer=2")
CELLS = [
    (family, notation)
    for family in tiny.FAMILIES
    for notation in SHARED
    # Its tower attends inside windows, so that it gives no attention that HiPrune could read.
    if not (family == "qwen2_5_vl" and notation.startswith("hiprune"))
]
OWN = ("frame-subsample:retention=0.5", "tome:retention=0.3")


def prompts(family: str, rows: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A model with inputs of one row and of several rows about the same clip."""
    model, processor = loaded(family)
    clip = clip_of(item(1, 0))
    questions = ["What moves?", "How many red things are there in this scene?", "Where?"][:rows]
    several = build_prompt(processor, clip, questions, whole_frames=True).on(model)
    return model, build_prompt(processor, clip, questions[:1], whole_frames=True).on(model), several


def logits(run: Run, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = run.model(**inputs).logits[:, -1]
    return found


@pytest.mark.parametrize(("family", "notation"), CELLS)
def test_shared_features_change_nothing(family: str, notation: str) -> None:
    """Logits and kept tokens of a batch of three questions are equal bit for bit, whoever encoded the clip."""
    model, single, several = prompts(family, 3)
    host = host_for(model)
    run = Run(model, host, parse(notation))
    with Run(model, host, [Collector(wanted=tuple(map(str, run.requests)))]) as collecting:
        encoding = record(collecting, single)
    with run:
        expected = logits(run, several)
        keeps = [part.keep for part in run.history[-1].items]
        for _ in range(2):
            with given(run, encoding, 3):
                again = logits(run, several)
            assert torch.equal(expected, again)
            assert all(torch.equal(a, b.keep) for a, b in zip(keeps, run.history[-1].items, strict=True))
    assert encoding.seconds > 0


def test_signals_of_a_text_tower_are_shared(tmp_path: Path) -> None:
    """Every question is compared with the frames by itself, though the clip was encoded for another."""
    model, single, several = prompts("llava_onevision", 3)
    for part in tiny.pair_of(model):
        part.save_pretrained(tmp_path)
    options = {"text_tower": str(tmp_path), "tokenizer": loaded("llava_onevision")[1]}
    session = Session(model, loaded("llava_onevision")[1], expand(["cdpruner"], [0.3]), "open", options=options)
    (setting,) = [one for one in session.runs if one.method == "cdpruner"]
    run, (collecting,) = session.runs[setting], session._shared.values()
    with collecting:
        encoding = record(collecting, single)
    with run:
        expected = logits(run, several)
        keeps = [part.keep for part in run.history[-1].items]
        with given(run, encoding, 3):
            assert torch.equal(expected, logits(run, several))
        assert all(torch.equal(a, b.keep) for a, b in zip(keeps, run.history[-1].items, strict=True))
    assert not torch.equal(keeps[0], keeps[1])


@pytest.mark.parametrize("notation", OWN)
def test_methods_at_the_encoder_encode_for_themselves(notation: str) -> None:
    """What they compute once per clip serves all questions as what they compute for every row."""
    model, single, several = prompts("llava_onevision", 2)
    methods = parse(notation)
    assert encodes_itself(methods) and not encodes_itself(parse("vidcom2"))
    with Run(model, host_for(model), methods) as run:
        expected = logits(run, several)
        with given(run, record(run, single), 2):
            again = logits(run, several)
    assert torch.allclose(expected, again, atol=1e-5)
    work = run.report.encoder
    assert work is not None and work.after < work.before


def test_generation_takes_shared_features_too() -> None:
    model, single, several = prompts("llava_onevision", 2)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    with Run(model, host_for(model), parse("vidcom2:retention=0.3")) as run:
        expected = model.generate(**several, **arguments)
        encoding = record(run, single)
        with given(run, encoding, 2):
            assert torch.equal(model.generate(**several, **arguments), expected)


def test_the_model_is_left_as_it_was() -> None:
    model, single, _ = prompts("llava_onevision", 1)
    before = set(vars(model.base_model)), len(model.base_model.language_model._forward_pre_hooks)
    with Run(model, host_for(model), parse("vidcom2")) as run:
        encoding = record(run, single)
        with given(run, encoding, 1):
            pass
    assert (set(vars(model.base_model)), len(model.base_model.language_model._forward_pre_hooks)) == before


def test_pooling_by_the_question_is_done_for_every_question() -> None:
    """PPLLaVA's visual tokens of one question answer no other: each is answered as if it were asked alone."""
    pair = AutoModel.from_pretrained(bundled("clip-pair"), dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(bundled(), dtype=torch.float32)
    model = assemble(pair, base=base, weighting="window_renorm").eval()
    words = AutoProcessor.from_pretrained(bundled())
    asked_words = AutoTokenizer.from_pretrained(bundled("clip-pair"))
    processor = assemble_processor(model, words.tokenizer, asked_words, chat_template=words.chat_template)
    register()
    register_host()
    asked = [
        item(
            0, number, question=one.question, candidates=one.candidates, answer=one.answer, read_frames=one.read_frames
        )
        for number, one in enumerate(items("test", 1, per_clip=4, frames=8))
    ]
    session = Session(model, processor, expand(["random"], [0.5]), "open", batch=3)
    units = list(session.run_clip(asked, list(session.runs)))
    assert [unit.get("error") for unit in units] == [None, None] and len(units[0]["answers"]) == 4
    tokens = []
    for one in asked:
        inputs = build_prompt(processor, clip_of(one), [one.question], whole_frames=True).on(model)
        (text,) = answer(model, processor.tokenizer, inputs, [one], "open")
        assert units[0]["answers"][one.id]["given"] == text
        tokens.append(torch.cat(visual_tokens(model, inputs)))
    # The tokens do differ, so that those of the first question would not have done.
    assert not any(torch.allclose(tokens[0], other, atol=1e-3) for other in tokens[1:])


def visual_tokens(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    names = ("pixel_values_videos", "question_ids", "question_mask")
    with torch.inference_mode():
        found: list[torch.Tensor] = model.model.get_video_features(*(inputs[name] for name in names)).pooler_output
    return found
