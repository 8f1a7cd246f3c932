"""SparseVLM: schedules, options, raters, the three versions on hosts, merged tokens."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.registry import build, parse
from tokensieve.core.sample import DecoderSample, HostFacts, PromptSample
from tokensieve.errors import MethodError, RetentionError
from tokensieve.hosts import tiny
from tokensieve.methods.sparsevlm import (
    BIAS,
    COUNTS,
    TEXT,
    SparseVLM,
    count_behind,
    kept_for,
    published_shares,
)
from tokensieve.ops.depth import average_shares, interpolated_shares, layer_average


def _facts(layers: int = 32, axes: int = 1, deepstack: int = 0) -> HostFacts:
    return HostFacts("family", layers, 24, 22, True, axes, deepstack)


def _schedule(method: SparseVLM, tokens: int, shares: tuple[float, ...]) -> list[int]:
    current, counts = tokens, []
    for share in shares:
        kept = kept_for(current, round(share * tokens), method.merges)
        current = count_behind(current, kept, method.merges)
        counts.append(kept)
    return counts


def test_labels_of_the_published_settings() -> None:
    """Averages over 32 layers with recycled tokens: 64.8, 96.9, 128.6 and 192.0 of 576."""
    averages = [576 * layer_average((2, 6, 15), row, 32) for row in published_shares("1.5")]
    assert averages == pytest.approx([64.8, 96.9, 128.6, 192.0], abs=0.05)


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_published_counts_come_out(version: str) -> None:
    """A published share behind the last cut gives that setting's counts at every cut."""
    method = SparseVLM(version=version)
    for counts, shares in zip(COUNTS[version], published_shares(version), strict=True):
        assert _schedule(method, 576, interpolated_shares(shares[-1], published_shares(version))) == list(counts)


def test_defaults() -> None:
    """Without options 300, 200, 110 of 576 behind layers 2, 6, 15."""
    method = SparseVLM()
    assert method.decoder_layers(_facts()) == (3, 7, 16)
    assert _schedule(method, 576, interpolated_shares(method.retention, published_shares("1.5"))) == [300, 200, 110]
    assert method.decoder_layers(_facts(28)) == (3, 6, 14)
    assert method.decoder_layers(_facts(36, 3, 3)) == (3, 8, 18)
    assert SparseVLM(version="1.0").decoder_layers(_facts()) == (3, 7, 16, 20)


@pytest.mark.parametrize("average", [0.12, 0.25, 1 / 3, 0.6])
@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_average_is_reached(average: float, version: str) -> None:
    """The mean over the layers, each counted with the tokens behind it, is the retention."""
    cuts = SparseVLM().decoder_layers(_facts(28))
    starts = [cut - 1 for cut in cuts]
    shares = average_shares(average, starts, 28, published_shares(version))
    assert layer_average(starts, shares, 28) == pytest.approx(average)
    with pytest.raises(RetentionError, match="cannot be reached"):
        SparseVLM(retention=0.05, average=True, version=version).check_host(_facts(28))


def test_wanted_number_is_hit_exactly() -> None:
    """Kept and merged tokens together are the wanted number, whatever it is."""
    for current in (16, 61, 400):
        for total in range(2, current):
            kept = kept_for(current, total, True)
            assert count_behind(current, kept, True) == max(total, count_behind(current, 1, True))
    assert kept_for(10, 12, True) == 10
    assert kept_for(10, 1, True) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "3"}, "released ones"),
        ({"version": "new"}, "released ones"),
        ({"version": 1.0, "counts": "3/2"}, "counts decides alone"),
        ({"counts": "3/0"}, "positive"),
        ({"layers": "6/2"}, "ascending"),
        ({"heads": 0}, "heads is 0"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    """Impossible settings are named."""
    with pytest.raises(MethodError, match=message):
        build("sparsevlm", options)


def test_refused_on_a_host() -> None:
    """Counts and cuts must be as many."""
    with pytest.raises(MethodError, match="2 cuts but counts"):
        SparseVLM(layers="2/6", counts="30/20/10").check_host(_facts())
    with pytest.raises(MethodError, match="give counts as well"):
        SparseVLM(layers="2/6/8/9").check_host(_facts())


def test_options_as_text() -> None:
    """Versions and lists in the notation of the command line."""
    (method,) = parse("sparsevlm:version=2.0,counts=238/108/60")
    assert isinstance(method, SparseVLM)
    assert (method.version, method.position_policy, method.merges) == ("2.0", "original", False)
    assert method.decoder_signals(_facts()) == (TEXT, BIAS)
    assert SparseVLM(version=2).version == "2.0"
    assert SparseVLM().position_policy == "renumber"


def test_question_must_follow_the_picture() -> None:
    """No text behind the visual tokens means no raters."""
    with pytest.raises(MethodError, match="put the question last"):
        SparseVLM().read_prompt(PromptSample(torch.randn(5, 4), torch.empty(0, 4)))


def _sample(tokens: int = 60, heads: int = 4, **signals: torch.Tensor) -> DecoderSample:
    generator = torch.Generator().manual_seed(2)
    attention = torch.rand(heads, 7, tokens, generator=generator) / tokens
    return DecoderSample(
        hidden=torch.randn(tokens, 8, generator=generator),
        layer=3,
        entered=tokens,
        view=torch.zeros(tokens, dtype=torch.long),
        item=torch.zeros(tokens, dtype=torch.long),
        signals={TEXT: attention, **signals},
        memory={"raters": torch.tensor([1, 4])},
        facts=_facts(),
    )


def test_merged_tokens_lie_between_their_members() -> None:
    """Recycled tokens stay inside the range of the dropped ones in every channel; kept tokens are unmodified."""
    sample = _sample()
    plan = SparseVLM(counts="20/10/5").plan_decoder(sample)
    assert plan.features is not None
    assert plan.keep.unique().numel() == plan.keep.numel() == 20 + 2
    assert torch.equal(plan.features[:20], sample.hidden[plan.keep[:20]])
    assert torch.equal(plan.keep[:20], plan.keep[:20].sort().values)
    dropped = torch.ones(60, dtype=torch.bool)
    dropped[plan.keep[:20]] = False
    low, high = sample.hidden[dropped].amin(0), sample.hidden[dropped].amax(0)
    assert bool(((plan.features[20:] >= low - 1e-4) & (plan.features[20:] <= high + 1e-4)).all())


def test_heads_of_version_two() -> None:
    """Half of the heads by default: a head without attention to the picture has no say."""
    sample = _sample(heads=2)
    sample.signals[TEXT][1] = 0.0  # type: ignore[index]
    ones = {**sample.signals, BIAS: torch.ones(7, 60)}
    method = SparseVLM(version="2.0", counts="20/10/5")
    plan = method.plan_decoder(_replaced(sample, ones))
    expected = sample.signals[TEXT][0, [1, 4]].mean(0).topk(20).indices.sort().values
    assert torch.equal(plan.keep, expected)
    assert plan.features is None


def _replaced(sample: DecoderSample, signals: dict[str, torch.Tensor]) -> DecoderSample:
    return DecoderSample(**{**vars(sample), "signals": signals})


def test_vanishing_bias_is_held_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Attention over a bias near zero stays finite."""
    sample = _sample()
    with caplog.at_level(logging.WARNING, logger="tokensieve"):
        plan = SparseVLM(version="2.0", counts="20/10/5").plan_decoder(
            _replaced(sample, {**sample.signals, BIAS: torch.zeros(7, 60)})
        )
    assert torch.isfinite(plan.info["scores"]).all()
    assert "position bias" in caplog.text


def test_small_pictures_keep_a_token() -> None:
    """One and two tokens pass every version."""
    for tokens in (1, 2, 3):
        for version in ("1.0", "1.5", "2.0"):
            sample = _sample(tokens, **{BIAS: torch.ones(7, tokens)})
            plan = SparseVLM(retention=0.1, version=version).plan_decoder(sample).checked(tokens, "sparsevlm")
            assert 1 <= plan.keep.numel() <= tokens


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_other_versions_in_a_batch(family: str, version: str) -> None:
    """Uneven padded rows equal rows alone; caches get shorter; decoding works."""
    model, processor = tiny.load(family)
    model.eval()
    batch = tiny.example_inputs(family, processor, batch=2)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), tokensieve.compress(model, f"sparsevlm:version={version},retention=0.1") as run:
        together = model(**batch).logits[:, -1]
        texts = model.generate(**batch, **options)[:, -3:]
        for item in run.history[-1].items:
            assert item.decoder[max(item.decoder)].numel() < item.keep.numel()
        for row in range(2):
            alone = tiny.example_inputs(family, processor, batch=2, row=row)
            assert torch.allclose(together[row], model(**alone).logits[0, -1], atol=5e-5, rtol=1e-4)
            assert torch.equal(texts[row], model.generate(**alone, **options)[0, -3:])
