"""The models that ship with the package: what they are, what they can do, how large they are."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPModel
from transformers import LlavaOnevisionForConditionalGeneration as LlavaOnevision

import tokensieve
from tokensieve.bench.data import item_like
from tokensieve.bench.engine import bench_session
from tokensieve.bench.journal import Journal
from tokensieve.bench.session import Session
from tokensieve.bench.settings import FULL, expand
from tokensieve.cli.demo import CLIP, QUESTIONS
from tokensieve.errors import HostError
from tokensieve.load import load_model
from tokensieve.video import read_clip
from tokensieve.world import bundled, items, questions, scene_of
from tokensieve.world.draw import draw
from tokensieve.world.training.labels import PHRASES, label

PACKAGE = Path(tokensieve.__file__).parent


def test_the_bundled_models_are_plain_transformers_models():
    clip = AutoModel.from_pretrained(bundled("clip-pair"))
    llm = AutoModelForImageTextToText.from_pretrained(bundled())
    assert type(clip) is CLIPModel
    assert type(llm) is LlavaOnevision
    for name, value in clip.vision_model.state_dict().items():
        assert torch.equal(value, llm.model.vision_tower.state_dict()[name]), name


def test_package_and_weights_stay_small():
    weights = sum(path.stat().st_size for path in PACKAGE.rglob("*.safetensors"))
    shipped = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert weights <= 20e6
    assert sum(path.stat().st_size for path in shipped) <= 40e6


def test_an_unknown_bundled_model_is_named():
    with pytest.raises(HostError, match="qwen"):
        bundled("qwen")


@pytest.fixture(scope="module")
def llm():
    return load_model("bundled", "float32")


def _answers(llm, asked) -> list[str]:
    model, processor = llm
    texts, videos = [], []
    for item in asked:
        content = [{"type": "video"}, {"type": "text", "text": item.question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        videos.append(item.read_frames()[0])
    inputs = processor(text=texts, videos=videos, padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        produced = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    said = processor.batch_decode(produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def test_it_answers_questions_about_unseen_clips(llm):
    """A regression test on few clips; benchmarks/world_accuracy.py measures many."""
    asked = items("validation", 24, per_clip=10)
    said = [answer for begin in range(0, len(asked), 8) for answer in _answers(llm, asked[begin : begin + 8])]
    right = defaultdict(list)
    for item, answer in zip(asked, said, strict=True):
        right[item.family].append(answer == item.answer)
    shares = {family: np.mean(hits) for family, hits in right.items()}
    assert np.mean(list(shares.values())) > 0.9 and min(shares.values()) > 0.65, shares


def test_at_retention_one_every_method_answers_as_the_full_model(llm, tmp_path):
    settings = expand(["all"], [1.0])
    asked = [item_like(one) for one in items("validation", 2, per_clip=4)]
    session = Session(*llm, settings, "open")
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        bench_session(session, asked, settings, journal)
        given = {(setting, clip): unit["answers"] for (setting, clip), unit in journal.units.items()}
    clips = {item.clip for item in asked}
    assert len(given) == len(clips) * len(session.runs) and len(session.runs) > 35
    for (setting, clip), answers in given.items():
        assert answers == given[FULL, clip], setting


def test_it_takes_several_turns_about_one_clip(llm):
    model, processor = llm
    hits = []
    for index in range(12):
        scene = scene_of("validation", index)
        found = questions(scene)
        first, second = found["attributes"][0], found["reading"][0]
        content = [{"type": "video"}, {"type": "text", "text": first.text}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": first.answer},
            {"role": "user", "content": second.text},
        ]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[text], videos=[draw(scene)], return_tensors="pt")
        produced = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said = processor.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        hits.append(said.strip() == second.answer)
    assert np.mean(hits) > 0.7


def test_patches_and_phrases_of_the_clip_pair_say_where():
    """The post-normalised, projected patch at an object is nearest to the object's name among all names."""
    clip = AutoModel.from_pretrained(bundled("clip-pair"), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(bundled("clip-pair"))
    frames, targets = [], []
    for index in range(24):
        scene = scene_of("validation", index)
        frames.append(draw(scene)[8])
        targets.append(label(scene, 8, np.random.default_rng(0)).patches)
    with torch.no_grad():
        pixels = processor(images=frames, return_tensors="pt")["pixel_values"]
        states = clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        patches = clip.visual_projection(clip.vision_model.post_layernorm(states))
        words = processor(text=[f"the {phrase}" for phrase in PHRASES], padding=True, return_tensors="pt")
        text = clip.text_projection(clip.text_model(**words).pooler_output)
    nearest = (torch.nn.functional.normalize(patches, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T).argmax(
        -1
    )
    wanted = torch.from_numpy(np.stack(targets))
    something = (wanted >= 0) & (wanted != len(PHRASES) - 1)
    assert (nearest == wanted)[something].float().mean() > 0.9


def test_the_clip_of_the_demo_is_the_first_test_clip():
    data = PACKAGE / "data"
    frames = np.asarray(read_clip(data / CLIP, 16).frames).astype(int)
    assert np.abs(frames - draw(scene_of("test", 0))).mean() < 4
    known = {question.text: question.answer for found in questions(scene_of("test", 0)).values() for question in found}
    for row in json.loads((data / QUESTIONS).read_text()):
        assert known[row["question"]] == row["answer"]
