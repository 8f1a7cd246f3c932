"""PPLLaVA without training, on hosts whose tower has a known text half."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError, SignalError
from tokensieve.hosts import tiny
from tokensieve.methods.ppllava import ALIGNED, QUESTION, SCALE, PPLLaVA, extended_pair, window_for
from tokensieve.models.ppllava import prompt_guided_pool
from tokensieve.pairing import load_pair

CLIP = ["llava", "llava_next", "llava_next_video"]
SIGLIP = ["llava_onevision", "llava_video"]


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _sample(layout: Layout, width: int = 8, scale: float = 40.0) -> TokenSample:
    signals = {ALIGNED: _draw(layout.patches, 5, seed=1), QUESTION: _draw(5, seed=2), SCALE: torch.tensor(scale)}
    return TokenSample(_draw(layout.patches, width), layout, signals)


class TestWindows:
    @pytest.mark.parametrize(
        ("size", "retention", "output"),
        [
            ((32, 24, 24), 1 / 18, (16, 8, 8)),
            ((32, 24, 24), 1 / 4, (32, 12, 12)),
            ((32, 24, 24), 1 / 9, (32, 8, 8)),
            ((8, 14, 14), 0.3, (8, 7, 7)),
            ((1, 24, 24), 1 / 9, (1, 8, 8)),
            ((1, 24, 24), 0.9, (1, 24, 24)),
            ((5, 13, 13), 0.5, (2, 13, 13)),
        ],
    )
    def test_grids_for_a_share(self, size: Any, retention: float, output: Any) -> None:
        assert window_for(size, retention).output == output

    @pytest.mark.parametrize("size", [(7, 13, 27), (1, 5, 9), (32, 24, 24), (2, 1, 1)])
    def test_every_patch_is_in_a_window(self, size: Any) -> None:
        for retention in (0.01, 0.1, 0.3, 0.7, 1.0):
            window = window_for(size, retention)
            for total, kernel, stride, count in zip(size, window.kernel, window.stride, window.output, strict=True):
                assert (count - 1) * stride + kernel == total and (count == 1 or kernel < 2 * stride)

    def test_published_windows(self) -> None:
        method = PPLLaVA()
        assert method.token_count(Layout.regular("video", 32, 24, 24)) == 1024
        assert method.token_count(Layout.regular("video", 64, 24, 24)) == 2048
        assert method.token_count(Layout.regular("video", 32, 27, 27)) == 1296
        assert method.token_count(Layout.regular("image", 1, 24, 24)) == 64
        assert method.token_count(Layout.regular("video", 1, 24, 24)) == 64
        assert PPLLaVA(kernel=(4, 2, 2)).token_count(Layout.regular("video", 32, 24, 24)) == 8 * 144


class TestPlan:
    def test_equals_the_operator(self) -> None:
        layout = Layout.regular("video", 5, 7, 9)
        sample = _sample(layout)
        plan = PPLLaVA(temperature=1e-3).plan_tokens(sample)
        unit = torch.nn.functional.normalize(sample.signals[ALIGNED], dim=-1)
        cosine = unit @ torch.nn.functional.normalize(sample.signals[QUESTION], dim=0)
        relevance = (40 * cosine).softmax(0).view(5, 7, 9)
        expected = prompt_guided_pool(sample.features.view(5, 63, 8), relevance, grid=(7, 9), temperature=1e-3)
        assert plan.features is not None and plan.merged is not None
        torch.testing.assert_close(plan.features, expected.flatten(0, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(plan.info["cosine"], cosine)
        # The merge map tells the same story: features are its weighted sums.
        source, target, weight = plan.merged
        summed = torch.zeros_like(plan.features).index_add(0, target, sample.features[source] * weight[:, None])
        torch.testing.assert_close(summed, plan.features, rtol=0, atol=1e-5)
        assert plan.keep.tolist() == [
            (63 * 2 * t) + 9 * (3 * r + 1) + 3 * c + 1 for t in range(2) for r in range(2) for c in range(3)
        ]

    @pytest.mark.parametrize("weighting", ["window_softmax", "window_renorm", "paper_raw"])
    def test_images_share_one_softmax_over_views(self, weighting: Any) -> None:
        cells = torch.cat(
            [
                torch.cartesian_prod(torch.tensor([v]), torch.arange(r), torch.arange(c))
                for v, r, c in ((0, 6, 6), (1, 7, 10))
            ]
        )
        layout = Layout.from_cells("image", [(6, 6), (7, 10)], cells)
        sample = _sample(layout)
        method = PPLLaVA(weighting=weighting)
        plan = method.plan_tokens(sample)
        _, relevance = method.relevance(sample)
        torch.testing.assert_close(relevance.sum(), torch.tensor(1.0))
        parts = []
        for part, grid in ((slice(0, 36), (6, 6)), (slice(36, 106), (7, 10))):
            options: dict[str, Any] = {"grid": grid, "kernel": (1, 3, 3), "weighting": weighting}
            features = sample.features[part][None]
            parts.append(prompt_guided_pool(features, relevance[part].view(1, *grid), **options).flatten(0, 2))
        assert plan.features is not None
        torch.testing.assert_close(plan.features, torch.cat(parts), rtol=0, atol=1e-6)
        assert plan.keep.numel() == method.token_count(layout) == 4 + 6
        assert plan.separators == "occupied"

    def test_bad_options(self) -> None:
        for options in (
            {"kernel": (2, 3)},
            {"kernel": (0, 3, 3)},
            {"kernel": 3},
            {"weighting": "max"},
            {"temperature": 0},
        ):
            with pytest.raises(MethodError):
                PPLLaVA(**options)  # type: ignore[arg-type]
        ragged = Layout.from_cells("video", [(2, 2), (2, 2)], torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1]]))
        with pytest.raises(MethodError, match="needs every frame in full"):
            PPLLaVA().token_count(ragged)


@pytest.fixture(scope="module")
def hosts() -> dict[str, Any]:
    found = {}
    for family in CLIP + SIGLIP:
        model, processor = tiny.load(family)
        found[family] = (model.eval(), processor, load_pair(*tiny.pair_of(model)))
    return found


def _first_token_logits(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


class TestHosts:
    @pytest.mark.parametrize("family", CLIP + SIGLIP)
    def test_counts_and_generation(self, hosts: Any, family: str) -> None:
        model, processor, pair = hosts[family]
        inputs = tiny.example_inputs(family, processor, batch=2)
        method = PPLLaVA(text_tower=pair, tokenizer=processor)
        with torch.no_grad(), tokensieve.compress(model, method) as run:
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        for item in run.history[0].items:
            assert item.keep.numel() == method.token_count(item.layout) < item.layout.patches

    @pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision"])
    def test_padded_batch_equals_rows(self, hosts: Any, family: str) -> None:
        model, processor, pair = hosts[family]
        method = PPLLaVA(text_tower=pair, tokenizer=processor, temperature=1e-4)
        batch = tiny.example_inputs(family, processor, batch=2)
        with tokensieve.compress(model, method):
            together = _first_token_logits(model, batch)
            for row in range(2):
                alone = tiny.example_inputs(family, processor, batch=2, row=row)
                torch.testing.assert_close(
                    together[row : row + 1], _first_token_logits(model, alone), rtol=1e-4, atol=2e-5
                )

    @pytest.mark.parametrize("family", ["llava", "llava_next_video", "llava_onevision"])
    def test_only_the_question_changes_the_tokens(self, hosts: Any, family: str) -> None:
        model, processor, pair = hosts[family]
        inputs = tiny.example_inputs(family, processor)
        seen: list[Any] = []
        results = []

        def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["inputs_embeds"])

        for question in ("Where is the red ball?", "What does the woman pour into the bowls?"):
            method = PPLLaVA(question=question, text_tower=pair, temperature=1e-5)
            with tokensieve.compress(model, method) as run:
                handle = model.base_model.language_model.register_forward_pre_hook(spy, with_kwargs=True)
                _first_token_logits(model, inputs)
                handle.remove()
            results.append((run.history[0].items[0].keep, seen[-1]))
        assert torch.equal(results[0][0], results[1][0])
        differ = (results[0][1] != results[1][1]).any(-1)[0]
        assert 0 < int(differ.sum()) <= results[0][0].numel()

    def test_retention_one_and_kernel_of_one(self, hosts: Any) -> None:
        model, processor, pair = hosts["llava_next_video"]
        inputs = tiny.example_inputs("llava_next_video", processor)
        before = _first_token_logits(model, inputs)
        for options in ({"retention": 1.0}, {"kernel": (1, 1, 1)}):
            method = PPLLaVA(text_tower=pair, tokenizer=processor, **options)  # type: ignore[arg-type]
            with tokensieve.compress(model, method):
                torch.testing.assert_close(_first_token_logits(model, inputs), before, rtol=0, atol=1e-6)

    def test_value_attention_is_of_siglip(self, hosts: Any) -> None:
        model, processor, pair = hosts["llava_onevision"]
        inputs = tiny.example_inputs("llava_onevision", processor)
        method = PPLLaVA(text_tower=pair, tokenizer=processor, value_attention=True, weighting="window_renorm")
        with tokensieve.compress(model, method):
            guided = _first_token_logits(model, inputs)
        assert guided.isfinite().all()
        clip, clip_processor, clip_pair = hosts["llava_next_video"]
        with pytest.raises(SignalError, match="head_attention"):
            tokensieve.compress(clip, PPLLaVA(text_tower=clip_pair, tokenizer=clip_processor, value_attention=True))

    def test_hosts_without_a_pair_say_so(self) -> None:
        model, _ = tiny.load("qwen2_5_vl")
        with pytest.raises(SignalError, match=r"encoder\.aligned, which qwen2_5_vl cannot give"):
            tokensieve.compress(model, "ppllava")

    def test_longer_context(self) -> None:
        model, _ = tiny.load("llava")
        contrast, tokenizer = tiny.pair_of(model)
        short, long = load_pair(contrast, tokenizer), extended_pair(load_pair(*tiny.pair_of(model)))
        assert (short.text_length, long.text_length) == (77, 248)
        question = "Where is the red ball?"
        torch.testing.assert_close(long.embed_question(question), short.embed_question(question))
        several = " ".join(["What happens in the video?"] * 30)
        other = several + " Where is the dog?"
        assert torch.equal(short.embed_question(several), short.embed_question(other))
        assert not torch.allclose(long.embed_question(several), long.embed_question(other))
