"""Training of the bundled models: resumable to the bit, and saved models that transformers loads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tokensieve.world import scene_of
from tokensieve.world.bundled import WEIGHTS
from tokensieve.world.draw import draw
from tokensieve.world.models import CLIP_PAIR, VIDEO_LLM, clip_pair, tokenizer, video_llm, video_processor
from tokensieve.world.questions import questions
from tokensieve.world.scene import practice
from tokensieve.world.training import curriculum
from tokensieve.world.training.answerer import Answerer, train_answerer
from tokensieve.world.training.attention import TurnAttention
from tokensieve.world.training.clips import Eye
from tokensieve.world.training.curriculum import Phase
from tokensieve.world.training.labels import CELL_WORDS, PHRASES, clip_targets, label
from tokensieve.world.training.optimise import Muon
from tokensieve.world.training.run import export
from tokensieve.world.training.state import Checkpoint
from tokensieve.world.training.tower import build, normalised, place_share, pooled, take_over, train_tower
from tokensieve.world.training.turns import IGNORED, choose, conversation, separate, turn


def test_turn_attention_and_its_gradients_equal_masked_attention():
    size, number, length = 250, 3, 7
    total = size + number * length
    torch.manual_seed(0)
    states = [torch.randn(2, 2, total, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query, key, value = states
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    for i in range(number):
        mask[size + i * length : size + (i + 1) * length, size : size + i * length] = False
    expected = (query @ key.transpose(-1, -2)).masked_fill(~mask, -1e300).softmax(-1) @ value
    found = TurnAttention.apply(query, key, value, (size, number, length))
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), states)
    given = torch.autograd.grad((found * weight).sum(), states)
    torch.testing.assert_close(found, expected)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_cached_tokens_and_turns_give_the_logits_of_the_model():
    """The fast path of the training computes what plain transformers computes for the same prompt."""
    torch.manual_seed(0)
    llm, processor = video_llm().eval(), video_processor()
    scene = scene_of("train", 5, 8)
    frames = draw(scene)
    question = questions(scene)["attributes"][0]
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question.text}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(text=[text], videos=[frames], return_tensors="pt")
    with torch.no_grad():
        expected = llm(**inputs).logits[0, -1]
        eye = Eye(llm.model.vision_tower, llm.model.multi_modal_projector)
        states = eye.tower(pixel_values=normalised(torch.from_numpy(frames)), output_hidden_states=True).hidden_states
        tokens = pooled(eye.projector(states[-2][:, 1:])).flatten(0, 1)[None]
        other = choose(scene, 3, np.random.default_rng(0))
        found, _ = Answerer(llm)(tokens, separate([[*other, question]]))
    answers = separate([[*other, question]]).targets
    last_turn = (answers != IGNORED).nonzero()[:, 1] == len(other)
    torch.testing.assert_close(found[last_turn][0], expected, atol=1e-4, rtol=1e-4)


def test_turns_are_written_as_the_chat_template_writes_them():
    scene = scene_of("train", 3)
    asked = choose(scene, 3, np.random.default_rng(0))
    processor, words = video_processor(), tokenizer()
    messages = []
    for i, question in enumerate(asked):
        content = [{"type": "video"}] if i == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": question.answer})
    written = words(processor.apply_chat_template(messages), add_special_tokens=False)["input_ids"]
    after_video = written[written.index(words.convert_tokens_to_ids("<video>")) + 1 :]
    found = conversation([asked])
    assert found.ids[0, 0].tolist() == after_video
    targets = found.targets[0, 0]
    said = [words.decode([int(t)]) for t in targets if t != IGNORED and t != words.eos_token_id]
    assert said == [question.answer for question in asked]


def test_a_target_stands_where_the_model_predicts_it():
    ids, targets = turn(questions(scene_of("train", 0))["counting"][0], True)
    for i, target in enumerate(targets):
        assert target in (IGNORED, *ids[i + 1 : i + 2])


def test_labels_of_a_frame_name_what_is_in_each_cell():
    scene = scene_of("train", 7)
    words, motion, fates = clip_targets(scene)
    assert words.shape == (16, 36, len(CELL_WORDS))
    thing = next(thing for thing in scene.things if thing.role == "mover")
    x, y = thing.centre(8)
    cell = int(y) // 16 * 6 + int(x) // 16
    named = {CELL_WORDS[i] for i in words[8, cell].nonzero()[0]}
    assert set(thing.name.split()) <= named
    assert motion[8, cell] > 0 and (motion[0] == 0).all()
    flash = next(thing for thing in scene.things if thing.role == "flash")
    assert fates[..., 0].sum() == len(scene.things)
    assert fates[flash.stop :, :, 1].sum() == (flash.stop < scene.frames)
    found = label(scene, 8, np.random.default_rng(0))
    assert (found.patches == PHRASES.index(thing.name)).sum() >= 1


def _parameters(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    stage, _ = build(seed)
    assert Checkpoint(folder).load({"stage": stage}, {}) > 0
    return stage.state_dict()


def test_a_killed_first_stage_goes_on_to_the_same_weights(tmp_path: Path):
    assert [record["step"] for record in train_tower(tmp_path / "whole", 3, batch=4, every=1)] == [1, 2, 3]
    killed = train_tower(tmp_path / "parts", 3, batch=4, every=1)
    next(killed)
    killed.close()
    (tmp_path / "parts" / "state-9.safetensors").write_bytes(b"half a file")
    assert [record["step"] for record in train_tower(tmp_path / "parts", 3, batch=4, every=1)] == [2, 3]
    whole, parts = _parameters(tmp_path / "whole"), _parameters(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list((tmp_path / "parts").glob("state-9*"))


def test_a_killed_second_stage_goes_on_to_the_same_weights_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(curriculum, "BLOCK_STEPS", 2)
    phases = (Phase(2, 4, 2, 3, 0.0), Phase(2, 8, 2, 3, 1.0))
    tower = tmp_path / "tower"
    list(train_tower(tower, 1, batch=4))
    records = list(train_answerer(tmp_path / "answerer", tower, phases, every=1, examine_every=99))
    assert [record["frames"] for record in records] == [4, 4, 8, 8]
    killed = train_answerer(tmp_path / "parts", tower, phases, every=1, examine_every=99)
    for _ in range(3):
        next(killed)
    killed.close()
    again = list(train_answerer(tmp_path / "parts", tower, phases, every=1, examine_every=99))
    assert again[-1]["loss"] == records[-1]["loss"]
    assert not list((tmp_path / "parts" / "blocks").glob("*.safetensors"))

    export(tmp_path, tmp_path / "models")
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    clip = AutoModel.from_pretrained(tmp_path / "models" / CLIP_PAIR)
    llm = AutoModelForImageTextToText.from_pretrained(tmp_path / "models" / VIDEO_LLM)
    assert type(clip) is type(clip_pair()) and clip.dtype == llm.dtype == torch.bfloat16
    for name, value in clip.vision_model.state_dict().items():
        assert torch.equal(value, llm.model.vision_tower.state_dict()[name]), name
    AutoProcessor.from_pretrained(tmp_path / "models" / CLIP_PAIR)
    AutoProcessor.from_pretrained(tmp_path / "models" / VIDEO_LLM)


def test_saved_models_are_trained_further_and_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(curriculum, "BLOCK_STEPS", 2)
    start = WEIGHTS
    saved, _ = build(0)
    take_over(saved, start)
    list(train_tower(tmp_path / "tower", 2, start=start, batch=4))
    found = _parameters(tmp_path / "tower")
    same = {name for name, value in saved.state_dict().items() if torch.equal(value, found[name])}
    assert {name for name in found if name.startswith(("clip.", "embeddings."))} <= same
    assert not any(name.startswith("projector.") and name.endswith("weight") for name in same)

    phases = (Phase(2, 8, 2, 4, 0.0, focus=True), Phase(2, 8, 2, 4, 1.0))
    options = {"start": start, "every": 1, "examine_every": 99}
    whole = list(train_answerer(tmp_path / "whole", tmp_path / "tower", phases, **options))
    assert whole[0]["loss"] < 3, "the saved language model must be where it starts"
    killed = train_answerer(tmp_path / "parts", tmp_path / "tower", phases, **options)
    next(killed)
    killed.close()
    again = list(train_answerer(tmp_path / "parts", tmp_path / "tower", phases, **options))
    assert [record["loss"] for record in again] == [record["loss"] for record in whole[1:]]


def test_practice_scenes_compare_more_objects_and_say_what_is_drawn():
    compared = {index: practice(index, 16).watched for index in range(40)}
    assert all(len(compared[index]) <= 1 for index in range(1, 40, 2))
    assert max(map(len, compared.values())) >= 2
    answers = Counter(
        question.answer for i in range(0, 400, 2) for question in questions(practice(i, 16))["two-places"]
    )
    assert 0.4 < answers["yes"] / answers.total() < 0.6
    for index in range(600):
        scene = practice(index, 16)
        assert all(scene.things[i].later_colour != scene.counted for i in scene.watched)
        asked = choose(scene, 64, np.random.default_rng(0), focus=True)
        assert len({question.text for question in asked}) == len(asked)
        counts = [question for question in asked if question.family == "counting"]
        assert 1 <= len(counts) <= 3


def test_the_share_of_place_in_the_variance_of_tokens():
    torch.manual_seed(0)
    content, place = torch.randn(4000, 36, 8), torch.randn(1, 36, 8)
    place = (place - place.mean(1, keepdim=True)) / place.std(1, keepdim=True, correction=0)
    assert place_share(content) < 0.001
    assert place_share(content + place) == pytest.approx(0.5, abs=0.02)
    assert place_share(content * 0 + place) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_matrices_together_are_updated_as_pytorch_updates_each(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tokensieve.world.training.optimise.fast_dtype", lambda: torch.float32)
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [torch.nn.Parameter(one.detach().clone()) for one in mine]
    own = Muon(mine, lr=0.01)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(shape)
            other.grad = one.grad.clone()
        own.step()
        reference.step()
    step = 0.01 * 0.2 * max(shape) ** 0.5
    for one, other in zip(mine, theirs, strict=True):
        # PyTorch rounds to bf16 on the way.
        torch.testing.assert_close(one, other, atol=0.1 * step, rtol=0)


def test_the_second_stage_needs_the_first(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="first stage"):
        next(train_answerer(tmp_path / "answerer", tmp_path / "tower", (Phase(24, 4, 2, 2, 0.0),)))


def test_every_word_of_a_phrase_is_known():
    words = tokenizer()
    unknown = words.unk_token_id
    for phrase in PHRASES:
        assert unknown not in words(phrase, add_special_tokens=False)["input_ids"]
