"""ToMe: sizes and members over many blocks, proportional attention, schedules, merging to a target."""

from __future__ import annotations

import pytest
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.methods import tome, tome_merge
from tokensieve.methods.tome import GROUPS, Tome
from tokensieve.methods.tome_merge import KEYS, TomeMerge
from tokensieve.ops.bipartite import TokenGroups
from tokensieve.ops.merge import apply_merge


def _tokens(batch: int, tokens: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(seed))


def _attend(values: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one head with queries, keys and values equal to the tokens."""
    logits = (values @ values.transpose(1, 2)).unsqueeze(1)
    shares = (logits if bias is None else logits + bias).softmax(dim=-1)
    return (shares @ values.unsqueeze(1))[:, 0], values


def _feed(values: torch.Tensor) -> torch.Tensor:
    return 0.1 * values.tanh()


def _run(values: torch.Tensor, schedule: list[int], **options: bool) -> tuple[torch.Tensor, list[tome.MergeState]]:
    states = [tome.initial_state(*values.shape[:2])]
    for r in schedule:
        values, state = tome.merge_block(values, states[-1], _attend, _feed, r, **options)
        states.append(state)
    return values, states


@pytest.mark.parametrize("class_token", [False, True])
def test_sizes_and_members_add_up(class_token: bool) -> None:
    values, schedule = _tokens(3, 33), [8, 8, 20, 1]
    out, states = _run(values, schedule, class_token=class_token)
    counts = tome.tokens_after(33, schedule, int(class_token))
    for state, count in zip(states[1:], counts, strict=True):
        members = tome.source_map(state.groups)
        assert members.shape == (3, count, 33)
        assert bool((members.sum(dim=1) == 1).all())
        torch.testing.assert_close(members.sum(dim=2).float(), state.size)
        if class_token:
            assert bool((members[:, 0, 1:] == 0).all())
    assert out.shape == (3, counts[-1], 8)
    restored = tome.restore(out, states[-1])
    assert restored.shape == values.shape
    pooled = tome.weighted_pool(out, states[-1])
    torch.testing.assert_close(pooled, restored.mean(dim=1))


def test_no_merging_is_the_plain_encoder() -> None:
    values = _tokens(2, 9)
    out, states = _run(values, [0, 0])
    plain = values
    for _ in range(2):
        plain = plain + _attend(plain, None)[0]
        plain = plain + _feed(plain)
    assert torch.equal(out, plain)
    assert bool((states[-1].size == 1).all())


def test_a_merged_pair_counts_twice_in_attention() -> None:
    values = _tokens(1, 6)
    values[0, 4] = values[0, 1]
    full, _ = _attend(values, None)
    groups = TokenGroups(torch.tensor([[0, 1, 2, 3, 1, 4]]), torch.tensor([[0, 1, 2, 3, 5]]))
    merged, size = tome.merge_weighted(values, torch.ones(1, 6), groups)
    short, _ = _attend(merged, tome.proportional_bias(size))
    torch.testing.assert_close(short, full[:, [0, 1, 2, 3, 5]], rtol=0, atol=1e-5)
    off, _ = _attend(merged, None)
    assert float((off - short).abs().max()) > 1e-3


def test_proportional_attention_can_be_off() -> None:
    values = _tokens(1, 12)
    on, off = (_run(values, [4, 2], proportional=flag)[0] for flag in (True, False))
    assert on.shape == off.shape
    assert float((on - off).abs().max()) > 1e-4


def test_schedules() -> None:
    assert tome.merge_schedule(4, 8) == [8, 8, 8, 8]
    assert tome.merge_schedule(5, 8, -1.0) == [16, 12, 8, 4, 0]
    assert tome.merge_schedule(5, 8, 1.0) == [0, 4, 8, 12, 16]
    assert tome.merge_schedule(4, [3, 1]) == [3, 1, 0, 0]
    assert tome.merge_schedule(1, 8, -1.0) == [16]
    assert tome.tokens_after(197, [8] * 24, 1)[:3] == [189, 181, 173]
    assert tome.tokens_after(5, [100, 100, 100], 1) == [3, 2, 2]
    with pytest.raises(MethodError, match="for 2 blocks"):
        tome.merge_schedule(2, [1, 2, 3])


@pytest.mark.parametrize("target", [1, 3, 9, 17, 20])
def test_merging_to_a_target(target: int) -> None:
    features, keys = _tokens(3, 20, 5), _tokens(3, 20, 4, seed=1)
    out, state = tome_merge.merge_tokens(features, keys, target)
    assert out.shape == (3, target, 5)
    assert state.size.sum(dim=1).tolist() == [20.0] * 3
    for row in range(3):
        means = [features[row][state.groups.group[row] == j].mean(dim=0) for j in range(target)]
        torch.testing.assert_close(out[row], torch.stack(means), rtol=1e-4, atol=1e-6)
    merged = tome_merge.frames_as_merged(out, state)
    torch.testing.assert_close(apply_merge(features.flatten(0, 1), merged.merge_map, 3 * target), merged.features)
    places = torch.arange(20.0)
    for row in range(3):
        order = [
            float(places[merged.merge_map.target[row * 20 : row * 20 + 20] == row * target + j].mean())
            for j in range(target)
        ]
        assert order == sorted(order)
    assert bool((merged.merge_map.target[merged.source] == torch.arange(3 * target)).all())


def test_method() -> None:
    layout = Layout.regular("video", 3, 4, 4, "row")
    features, keys = _tokens(3, 16).flatten(0, 1), _tokens(3, 16, 4, seed=1).flatten(0, 1)
    method = TomeMerge(retention=0.3)
    plan = method.plan_tokens(TokenSample(features, layout, {KEYS: keys}))
    assert plan.keep.numel() == method.token_count(layout) == 15
    assert torch.bincount(plan.keep // 16).tolist() == [5, 5, 5]
    alone = method.plan_tokens(TokenSample(features[:16], layout.of_view(0), {KEYS: keys[:16]}))
    assert alone.features is not None and plan.features is not None
    torch.testing.assert_close(plan.features[:5], alone.features)


def test_bad_target() -> None:
    for target in (0, 21):
        with pytest.raises(MethodError, match=f"cannot merge to {target} tokens"):
            tome_merge.merge_tokens(_tokens(1, 20), _tokens(1, 20), target)


@pytest.mark.parametrize(
    ("tokens", "target", "layers"), [(576, 144, 23), (64, 19, 3), (64, 8, 3), (10, 10, 4), (9, 5, 1)]
)
def test_spread_reaches_the_target(tokens: int, target: int, layers: int) -> None:
    schedule = tome.spread_schedule(tokens, target, layers)
    assert len(schedule) == layers
    assert tome.tokens_after(tokens, schedule)[-1] == target
    if tokens == 576:
        assert max(schedule) - min(schedule) <= 1


def test_spread_halves_where_the_target_is_out_of_reach() -> None:
    assert tome.spread_schedule(64, 7, 3) == [32, 16, 8]
    assert tome.tokens_after(81, tome.spread_schedule(81, 1, 4)) == [41, 21, 11, 6]


def test_groups_become_tokens_in_the_order_of_their_mean_places() -> None:
    group = torch.tensor([7, 3, 3, 7, 12, 3, 12])
    source, merge_map = tome.tokens_of_groups(group)
    # Means: 7 at 1.5, 3 at 8 / 3, 12 at 5; the nearest member stands for each, the first of two.
    assert source.tolist() == [0, 2, 4]
    assert merge_map.source.tolist() == list(range(7))
    assert merge_map.target.tolist() == [0, 1, 1, 0, 2, 1, 2]
    torch.testing.assert_close(merge_map.weight, torch.tensor([1 / 2, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1 / 3, 1 / 2]))


def test_tower_method_plans_groups_or_everything() -> None:
    layout, features = Layout.regular("image", 1, 2, 3), torch.zeros(6, 4)
    whole = Tome(0.5).plan_tokens(TokenSample(features, layout))
    assert whole.keep.tolist() == list(range(6)) and whole.merged is None
    groups = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 1.0])
    plan = Tome(0.5).plan_tokens(TokenSample(features, layout, {GROUPS: groups}))
    assert plan.keep.tolist() == [0, 2, 3] and plan.features is None
    assert Tome(output="unmerge").stages == ("encoder",) != Tome().stages


@pytest.mark.parametrize(
    ("options", "message"),
    [({"output": "grid"}, "knows auto, tokens, unmerge"), ({"r": 0}, "at least 1"), ({"inflect": 2}, "from -1")],
)
def test_tower_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        Tome(0.5, **options)  # type: ignore[arg-type]
