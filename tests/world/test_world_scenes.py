"""Scenes and questions: reproducible, disjoint, balanced, and true to what is drawn."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from tokensieve.world import FAMILIES, SPLITS, items, questions, scene_of
from tokensieve.world.draw import draw
from tokensieve.world.scene import SIZE, crowd
from tokensieve.world.words import COLOUR_NAMES, COLOURS, DIGITS, SHAPES, vocabulary


def test_a_scene_is_a_function_of_its_number():
    assert scene_of("test", 3) == scene_of("test", 3)
    assert np.array_equal(draw(scene_of("test", 3)), draw(scene_of("test", 3)))
    assert questions(scene_of("test", 3)) == questions(scene_of("test", 3))


def test_no_clip_of_one_split_occurs_in_another():
    def contents(split: str, number: int) -> set[object]:
        return {(scene.things, scene.signs) for scene in (scene_of(split, i) for i in range(number))}

    seen = {"train": contents("train", 4000), "validation": contents("validation", 500), "test": contents("test", 500)}
    assert [len(found) for found in seen.values()] == [4000, 500, 500]
    assert not seen["test"] & (seen["train"] | seen["validation"])
    assert not seen["train"] & seen["validation"]


def test_no_two_splits_share_a_seed():
    assert len(set(SPLITS.values())) == len(SPLITS)
    assert {scene_of(split, 0).seed[0] for split in SPLITS} == set(SPLITS.values())
    assert crowd((0, 1)).seed[0] not in SPLITS.values()


def test_a_guess_from_the_words_of_the_question_stays_at_chance():
    """The best blind answerer knows how often each answer followed each question; it must gain nothing by that."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(6000):
        for found in questions(scene_of("train", index)).values():
            for question in found:
                seen[question.text][question.answer] += 1
    right, chance = defaultdict(list), defaultdict(list)
    for index in range(1000):
        for family, found in questions(scene_of("test", index)).items():
            for question in found:
                known = seen[question.text] or Counter(question.candidates)
                right[family].append(known.most_common(1)[0][0] == question.answer)
                chance[family].append(question.chance)
    for family in FAMILIES:
        gain = np.mean(right[family]) - np.mean(chance[family])
        assert gain < 0.05, (family, gain)


def test_every_question_names_its_answer_among_its_candidates():
    words = set(vocabulary())
    for index in range(200):
        for family, found in questions(scene_of("test", index)).items():
            for question in found:
                assert question.family == family
                assert question.answer in question.candidates
                assert len(set(question.candidates)) == len(question.candidates) >= 2
                said = question.text.replace("?", " ?").replace(",", " ,").split()
                assert set(said) <= words


def _colour_near(frame: np.ndarray, centre: tuple[float, float]) -> str:
    """Name of the colour that most pixels around a point are closest to."""
    x, y = (int(np.clip(c, 3, SIZE - 4)) for c in centre)
    pixels = frame[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 1, 3).astype(float)
    table = np.array([COLOURS[name] for name in COLOUR_NAMES], float)
    distance = np.linalg.norm(pixels - table, axis=-1)
    near = distance.min(-1) < 60
    return COLOUR_NAMES[Counter(distance[near].argmin(-1).tolist()).most_common(1)[0][0]] if near.any() else ""


def test_what_the_scene_says_is_what_the_frames_show():
    hits = []
    for index in range(30):
        scene = scene_of("test", index)
        frames = draw(scene)
        for thing in scene.things:
            if SHAPES[thing.shape] == "ring":
                continue
            for frame in range(thing.first, thing.stop, 3):
                hits.append(_colour_near(frames[frame], thing.centre(frame)) == COLOUR_NAMES[thing.colour_at(frame)])
    assert np.mean(hits) > 0.95


def test_flashes_last_one_frame_and_events_stay_in_their_quarter():
    for index in range(100):
        scene = scene_of("train", index)
        for thing in scene.things:
            if thing.role == "flash":
                assert thing.stop - thing.first == 1
            if thing.role == "event":
                assert thing.first * 4 // scene.frames == (thing.stop - 1) * 4 // scene.frames
        assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things)


def test_a_sign_shows_its_digit():
    from tokensieve.world.draw import _sign_patch

    patches = {digit: _sign_patch(0, digit)[2:12, 2:8, 0] for digit in range(len(DIGITS))}
    assert len({patch.tobytes() for patch in patches.values()}) == len(DIGITS)
    scene = scene_of("test", 0)
    frames = draw(scene)
    sign = scene.signs[0]
    left, top = round(sign.centre[0] - 5), round(sign.centre[1] - 6.5)
    shown = frames[sign.first, top + 2 : top + 12, left + 2 : left + 8, 0].astype(float)
    errors = {digit: np.abs(shown - _sign_patch(sign.panel, digit)[2:12, 2:8, 0]).mean() for digit in range(10)}
    assert min(errors, key=errors.__getitem__) == sign.digit


def test_long_clips_hide_a_flash_among_many_frames():
    scene = scene_of("long", 0, 128)
    assert scene.frames == 128
    flash = next(thing for thing in scene.things if thing.role == "flash")
    frames = draw(scene)
    name = COLOUR_NAMES[flash.colour]
    assert len(frames) == 128
    if SHAPES[flash.shape] != "ring":
        assert _colour_near(frames[flash.first], flash.start) == name


def test_items_are_spread_over_the_families():
    found = items("test", 100)
    share = Counter(item.family for item in found)
    assert len(found) == 200
    assert max(share.values()) - min(share.values()) <= 2
    assert len({item.id for item in found}) == 200
    frames, rate = found[0].read_frames()
    assert frames.shape == (16, SIZE, SIZE, 3)
    assert rate > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: scene_of("exam", 0),
        lambda: scene_of("test", -1),
        lambda: scene_of("test", 0, 3),
        lambda: items("test", 0),
        lambda: items("test", 1, ("colours",)),
    ],
)
def test_bad_arguments_are_named(call):
    with pytest.raises(ValueError, match=r"exam|-1|3|0|colours"):
        call()
