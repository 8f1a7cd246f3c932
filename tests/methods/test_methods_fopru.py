"""FoPru: the variance rule, both strategies, and the tower layer that it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError, RetentionError
from tokensieve.hosts import tiny
from tokensieve.methods.fopru import FoPru, attention_means, grouped_variance, select_rank, select_rows, significance

RECEIVED = "encoder.received_attention@feature"


def _softmax(frames: int, patches: int, heads: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(frames, heads, patches, patches, generator=generator)).softmax(dim=-1)


def _scores(attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Significance, the frames in which the given attention decides, and the frame of every patch."""
    frames, patches = attention.shape[0], attention.shape[2]
    group = torch.arange(frames).repeat_interleave(patches)
    received, given = attention_means(attention)
    return *significance(received.flatten(), given.flatten(), group), group


def test_a_hot_column_is_kept_first() -> None:
    attention = torch.full((1, 2, 36, 36), 1 / 72)
    attention[..., 21] += 0.5
    scores, by_given, group = _scores(attention)
    assert by_given.tolist() == [False]
    assert select_rank(scores, group, 1 / 36).tolist() == [21]
    row = torch.arange(36) // 6
    assert select_rows(scores, group, row, 1 / 6).tolist() == list(range(18, 24))


def test_the_given_attention_decides_when_it_varies_more() -> None:
    share = torch.rand(25, generator=torch.Generator().manual_seed(1))
    attention = (share[:, None] / 25).expand(1, 4, 25, 25)
    scores, by_given, group = _scores(attention)
    assert by_given.tolist() == [True]
    assert select_rank(scores, group, 0.2).tolist() == sorted(share.topk(5).indices.tolist())


def test_rows_that_sum_to_one_leave_the_received_attention() -> None:
    attention = _softmax(4, 49)
    scores, by_given, group = _scores(attention)
    assert not bool(by_given.any())
    expected = attention.mean(dim=1).mean(dim=1).topk(12, dim=1).indices.sort(dim=1).values
    assert torch.equal(select_rank(scores, group, 0.25).view(4, 12) % 49, expected)
    permuted, _, _ = _scores(attention[:, [2, 0, 1]])
    assert torch.equal(select_rank(permuted, group, 0.25), select_rank(scores, group, 0.25))


def test_frames_decide_alone() -> None:
    plain = _softmax(1, 16)
    given = (torch.arange(16)[:, None] / 256).expand(1, 3, 16, 16)
    scores, by_given, _ = _scores(torch.cat((plain, given)))
    assert by_given.tolist() == [False, True]
    alone = torch.cat([_scores(part)[0] for part in (plain, given)])
    assert torch.equal(scores, alone)


def test_variance_of_groups() -> None:
    values, group = torch.rand(40) * 1e-5, torch.arange(40) % 3
    expected = torch.stack([values.double()[group == g].var(correction=0) for g in range(3)])
    torch.testing.assert_close(grouped_variance(values, group, 3), expected)
    assert bool((grouped_variance(values.half(), group, 3) > 0).all())


@pytest.mark.parametrize(("retention", "ranked", "rows"), [(0.25, 144, 6), (1.0, 576, 24), (0.0001, 1, 1)])
def test_counts_and_order(retention: float, ranked: int, rows: int) -> None:
    layout = Layout.regular("image", 1, 24, 24, "row")
    facts = HostFacts("any", 2, 2, 1, False)
    sample = TokenSample(torch.zeros(576, 4), layout, {RECEIVED: torch.rand(576)}, facts)
    for strategy, count in (("rank", ranked), ("row", rows * 24)):
        method = FoPru(retention=retention, strategy=strategy)
        keep = method.plan_tokens(sample).keep
        assert keep.numel() == method.token_count(layout) == count
        assert bool((keep.diff() > 0).all())
        if strategy == "row":
            assert (torch.bincount(keep // 24, minlength=24) % 24 == 0).all()


def test_rows_of_a_view_with_gaps() -> None:
    cells = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 2, 0], [0, 2, 1], [0, 2, 2], [1, 0, 0], [1, 1, 1]])
    layout = Layout.from_cells("video", [(3, 3), (2, 3)], cells)
    scores = torch.tensor([1.0, 5.0, 2.0, 2.0, 2.0, 1.0, 3.0])
    sample = TokenSample(torch.zeros(7, 2), layout, {RECEIVED: scores}, HostFacts("any", 2, 2, 1, False))
    method = FoPru(retention=0.5, strategy="row")
    assert method.token_count(layout) is None
    assert method.plan_tokens(sample).keep.tolist() == [0, 1, 6]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_it_reads_the_projected_layer(kernel: str) -> None:
    """Both directions on a tower with class token, against the attention maps of the tower itself."""
    model, processor = tiny.load("llava")
    inputs: Any = tiny.example_inputs("llava", processor)
    model.eval().set_attn_implementation(kernel)
    with torch.no_grad(), tokensieve.compress(model, "fopru", retention=0.3) as run:
        model(**inputs)
    item = run.history[-1].items[0]
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(inputs["pixel_values"], output_attentions=True)
    scores, by_given, group = _scores(out.attentions[model.config.vision_feature_layer][:1, :, 1:, 1:])
    torch.testing.assert_close(item.info["token_score"], scores, rtol=0, atol=1e-6)
    assert torch.equal(item.info["by_given_attention"], by_given)
    assert torch.equal(item.keep, select_rank(scores, group, 0.3))


def test_bad_input() -> None:
    with pytest.raises(MethodError, match="not 'columns'"):
        FoPru(strategy="columns")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"\(2, 4, 4\)"):
        attention_means(torch.rand(2, 4, 4))
    with pytest.raises(MethodError, match="variance rule"):
        significance(torch.rand(4), torch.rand(5), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RetentionError):
        select_rank(torch.rand(4), torch.zeros(4, dtype=torch.int64), 0.0)
