"""Methods on top of a PPLLaVA model: its layouts, its signals, and compressed runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ppllava_tiny import build

from tokensieve.core.encode import EncodeCall
from tokensieve.core.registry import parse
from tokensieve.core.runtime import Run
from tokensieve.models.ppllava.host import PPLlavaHost

METHODS = ["vidcom2:retention=0.5", "divprune:retention=0.5", "fastv:retention=0.5,layer=1", "visionzip:retention=0.5"]


def _clip(frames: int, seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=[{}, {"bt_adapter_depth": 2}], ids=["plain", "adapter"])
def parts(request: pytest.FixtureRequest) -> Any:
    return build(**request.param)


def _run(parts: Any, method: str, inputs: Any) -> tuple[Run, torch.Tensor]:
    model, _ = parts
    with torch.no_grad(), Run(model, PPLlavaHost(), parse(method)) as run:
        return run, model(**inputs).logits


class TestLayouts:
    def test_videos_of_different_length_and_a_shared_one(self, parts: Any) -> None:
        _, processor = parts
        long, short = _clip(6), _clip(3, 1)
        inputs = processor(
            text=["<video> a", "<video> b", "<video> c"], videos=[long, short, long], padding_side="left"
        )
        run, _ = _run(parts, "random:retention=0.5", inputs)
        views = [item.layout.views for item in run.history[0].items]
        assert views == [((4, 4),) * 3, ((4, 4),), ((4, 4),) * 3]
        assert [item.keep.numel() for item in run.history[0].items] == [24, 8, 24]

    def test_images(self, parts: Any) -> None:
        _, processor = parts
        wide, square = _clip(1, 2, 40, 80)[0], _clip(1, 3)[0]
        inputs = processor(text=["<image> a", "<image><image> b"], images=[[wide], [square, wide]], padding_side="left")
        run, _ = _run(parts, "random:retention=0.5", inputs)
        assert [item.layout.views for item in run.history[0].items] == [((4, 4), (4, 8)), ((4, 4),), ((4, 4),)]
        assert run.history[0].items[0].layout.tokens == 16 + 4 * 9


class TestRuns:
    @pytest.mark.parametrize("method", METHODS)
    def test_rows_of_a_padded_batch(self, parts: Any, method: str) -> None:
        _, processor = parts
        clips = [_clip(6), _clip(4, 1)]
        texts = [f"USER: <video>\n{question} ASSISTANT: " for question in ("Where?", "Who runs now?")]
        batch = processor(text=texts, videos=clips, padding_side="left")
        _, together = _run(parts, method, batch)
        for row in range(2):
            _, alone = _run(parts, method, processor(text=texts[row], videos=clips[row : row + 1]))
            torch.testing.assert_close(together[row, -1], alone[0, -1], rtol=1e-4, atol=2e-5)

    def test_everything_kept_changes_nothing(self, parts: Any) -> None:
        model, processor = parts
        inputs = processor(text="USER: <video>\nWhere? ASSISTANT: ", videos=[_clip(4)])
        with torch.no_grad():
            before = model(**inputs).logits
        _, after = _run(parts, "vidcom2:retention=1.0", inputs)
        assert torch.equal(before, after)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_generation(self, parts: Any, beams: int) -> None:
        model, processor = parts
        inputs = processor(text=["<video> Where?", "<video> Who?"], videos=_clip(4), padding_side="left")
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
        with torch.no_grad(), Run(model, PPLlavaHost(), parse("vidcom2:retention=0.5")) as run:
            said = model.generate(**inputs, **settings)
        assert said.shape == (2, inputs["input_ids"].shape[1] + 4)
        assert run.history[0].after[0] < run.history[0].before[0]

    def test_tower_signals_are_averaged_over_windows(self, parts: Any) -> None:
        """What a method sees of the tower is the mean over the patches of each window."""
        model, processor = parts
        inputs = processor(text="USER: <video>\nWhere? ASSISTANT: ", videos=[_clip(4)])
        host, base = PPLlavaHost(), model.base_model
        whole = torch.arange(4 * 144.0).view(4, 144)
        call = EncodeCall("video", {"pixel_values_videos": inputs["pixel_values_videos"]})
        (item,) = call.items = host.describe(base, call)
        call.forget_pixels()
        seen = host.pool(base, call, item, whole)
        cells = whole.view(2, 2, 4, 3, 4, 3).mean((1, 3, 5)).flatten()
        torch.testing.assert_close(seen, cells)
        run, _ = _run(parts, "fastervlm:retention=0.5", inputs)
        assert run.history[0].items[0].keep.numel() == 16

    def test_signals_of_tiles_travel_with_them(self, parts: Any) -> None:
        """Base view, then the mosaic of both tiles, its rows side by side."""
        model, processor = parts
        inputs = processor(text="<image> a", images=[_clip(1, 2, 40, 80)[0]])
        host, base = PPLlavaHost(), model.base_model
        arguments = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
        call = EncodeCall("image", arguments)
        (item,) = call.items = host.describe(base, call)
        call.forget_pixels()
        raw = torch.arange(3.0)[:, None].expand(3, 144)
        assert host.pool(base, call, item, raw).tolist() == [0.0] * 16 + ([1.0] * 4 + [2.0] * 4) * 4
