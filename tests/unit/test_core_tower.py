"""Shortening sequences inside the vision tower, on unmodified towers, against the same steps by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import logging

import tokensieve
from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import Layout
from tokensieve.core.sample import HostFacts
from tokensieve.core.tower_stage import TowerStage
from tokensieve.errors import MethodError, SignalError
from tokensieve.hosts import host_for, tiny
from tokensieve.hosts.towers import PictureTower
from tokensieve.methods import tome

FAMILIES = {"llava": "layer_norm1", "llava_onevision": "layer_norm1", "internvl": "layernorm_before"}
Model = tuple[Any, Any, dict[str, Tensor]]


@pytest.fixture(scope="module")
def models() -> Any:
    """Model, processor and inputs of a family, loaded once."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    cache: dict[str, Model] = {}

    def get(family: str) -> Model:
        if family not in cache:
            model, processor = tiny.load(family)
            cache[family] = (model.eval(), processor, dict(tiny.example_inputs(family, processor, batch=2)))
        return cache[family]

    return get


def _tower_pass(model: Any, inputs: Any, method: str, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Pixels, projected states of the tower and the run of one forward pass."""
    seen: list[tuple[Tensor, Any]] = []
    base = model.base_model

    def spy(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args[0] if args else kwargs["pixel_values"], output))

    handle = base.vision_tower.register_forward_hook(spy, with_kwargs=True)
    with torch.no_grad(), tokensieve.compress(model, method, **options) as run:
        model(**inputs)
    handle.remove()
    pixels, output = seen[0]
    states = output.hidden_states[run.facts.feature_layer + 1] if output.hidden_states else output.last_hidden_state
    return pixels, states, run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proportional", [True, False])
def test_merging_equals_the_blocks_by_hand(models: Any, family: str, proportional: bool) -> None:
    model, _, inputs = models(family)
    pixels, states, run = _tower_pass(model, inputs, "tome", r=5, inflect=-0.5, proportional=proportional)
    tower, host = model.base_model.vision_tower, host_for(model)
    embedded: list[Tensor] = []
    first = host.tower(model.base_model).blocks(tower)[0].layer
    handle = first.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    with torch.no_grad():
        tower(pixel_values=pixels)
    handle.remove()
    values = embedded[0]
    state = tome.initial_state(*values.shape[:2])
    marked = run.facts.has_class_token
    schedule = tome.merge_schedule(run.facts.feature_layer + 1, 5, -0.5)
    assert max(schedule) > 0
    for r, block in zip(schedule, host.tower(model.base_model).blocks(tower), strict=False):

        def attend(values: Tensor, bias: Tensor | None, block: Any = block) -> tuple[Tensor, Tensor]:
            normed = getattr(block.layer, FAMILIES[family])(values)
            keys = block.attention.k_proj(normed)
            if getattr(block.attention, "k_norm", None) is not None:
                keys = block.attention.k_norm(keys)
            update = block.attention(normed, attention_mask=bias)[0]
            scale = getattr(block.layer, "lambda_1", 1.0)
            return scale * update, keys.unflatten(-1, (block.attention.num_heads, -1)).mean(dim=2)

        def feed(values: Tensor, block: Any = block) -> Tensor:
            return (1.0 if block.scale is None else block.scale) * block.feed(block.norm(values))

        with torch.no_grad():
            values, state = tome.merge_block(
                values, state, attend, feed, r, class_token=marked, proportional=proportional
            )
    expected = tome.restore(values, state)
    if run.facts.feature_layer == run.facts.tower_layers - 1 and family == "internvl":
        expected = tower.layernorm(expected)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    counts = tome.tokens_after(embedded[0].shape[1], schedule, int(marked))
    tokens = run.history[0].items[0].info["tower_tokens"]
    assert tokens[: len(counts), 1].tolist() == counts


def test_merged_tokens_enter_the_llm_once(models: Any) -> None:
    """Every picture gives the number asked for, and the map tells where each patch went."""
    model, _, inputs = models("llava")
    with torch.no_grad(), tokensieve.compress(model, "tome:retention=0.25") as run:
        model(**inputs)
    for item in run.history[0].items:
        assert item.keep.numel() == 16
        assert item.merged is not None
        assert item.merged.source.tolist() == list(range(64))
        assert torch.equal(item.merged.target[item.keep], torch.arange(16))
        sums = torch.zeros(16).index_add(0, item.merged.target, item.merged.weight)
        torch.testing.assert_close(sums, torch.ones(16))
    assert run.report.encoder is not None
    assert run.report.encoder.after < 0.75 * run.report.encoder.before


def test_restored_grids_keep_their_length(models: Any) -> None:
    """Pooling hosts get all places back; another method may then choose among them."""
    model, _, inputs = models("llava_onevision")
    with torch.no_grad(), tokensieve.compress(model, "tome:retention=0.3") as run:
        model(**inputs)
    assert run.history[0].before == run.history[0].after
    groups = run.history[0].items[0].info["tower_groups"]
    # 30 % of 81 patches are left of every frame, and each patch knows what it became part of.
    assert groups.shape[1] == 81 and [row.unique().numel() for row in groups] == [24] * groups.shape[0]
    both = "tome:retention=0.3,output=unmerge+vidcom2:retention=0.3"
    with torch.no_grad(), tokensieve.compress(model, both) as run:
        model(**inputs)
        features = model.base_model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    with torch.no_grad(), tokensieve.compress(model, "vidcom2:retention=0.3") as alone:
        model(**inputs)
        whole = model.base_model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    assert [item.keep.numel() for item in run.history[0].items] == [
        item.keep.numel() for item in alone.history[0].items
    ]
    assert features.shape == whole.shape
    assert not torch.allclose(features, whole)


def test_frames_left_out_are_not_encoded(models: Any) -> None:
    """Frames of the first stage only reach the blocks, and merge as they would alone."""
    model, _, inputs = models("llava_onevision")
    pixels, states, run = _tower_pass(model, inputs, "frame-subsample:retention=0.5+tome:output=unmerge,retention=0.3")
    frames = sum(item.layout.views.__len__() for item in run.history[0].items)
    assert pixels.shape[0] == frames // 2
    kept = run.history[0].items[0].per_frame().nonzero().flatten()
    whole, full, _ = _tower_pass(model, inputs, "tome:output=unmerge,retention=0.3")
    torch.testing.assert_close(pixels[: kept.numel()], whole[kept])
    torch.testing.assert_close(states[: kept.numel()], full[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_dropped_patches_never_reach_the_llm(models: Any, family: str) -> None:
    """What enters are the projected states of the patches that the tower kept, in the order of the picture."""
    model, _, inputs = models(family)
    with torch.no_grad(), tokensieve.compress(model, "flowcut:retention=0.2") as run:
        seen: list[Tensor] = []
        text = model.base_model.language_model
        handle = text.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        features = model.base_model.get_image_features(
            **{name: x for name, x in inputs.items() if name in ("pixel_values", "image_sizes")}
        ).pooler_output
        model(**inputs)
        handle.remove()
    for row, item in enumerate(run.history[-1].items):
        assert bool((item.keep.diff() > 0).all())
        expected = features[row][item.layout.patch_tokens[item.keep]]
        distance = (expected[:, None] - seen[0][row][None]).abs().amax(-1).min(dim=1).values
        assert float(distance.max()) < 1e-4
        if family == "llava_next":
            wanted = round(item.layout.patches * 0.2)
            assert item.decoder[2].numel() == wanted < item.keep.numel()
        else:
            assert item.keep.numel() == 13 and not item.decoder


def test_uncoupled_pictures_run_alone(models: Any) -> None:
    """Without coupling every tile decides by itself; the counts may differ, each tile reaches its target."""
    model, _, inputs = models("llava_next")
    reached = []
    for coupled in (True, False):
        _, states, run = _tower_pass(model, inputs, "flowcut", retention=0.2, coupled=coupled)
        reached.append((states[:, 1:].abs().sum(-1) > 0).sum(1))
        assert run.history[0].items[0].info["tower_tokens"].shape == (4, 2)
    assert torch.equal(*reached)


def test_an_earlier_forward_of_the_instance_survives(models: Any) -> None:
    """Libraries that place models on devices put a ``forward`` of their own on every module."""
    model, _, inputs = models("llava")
    tower = model.base_model.vision_tower
    calls: list[int] = []
    original = tower.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    tower.forward = counted
    try:
        with torch.no_grad(), tokensieve.compress(model, "flowcut:retention=0.3"):
            model(**inputs)
        assert len(calls) == 2, "two images of a batch are encoded one after the other"
        assert vars(tower)["forward"] is counted
    finally:
        del tower.forward


def test_what_does_not_fit_is_refused(models: Any) -> None:
    model, _, _ = models("llava_onevision")
    with pytest.raises(SignalError, match=r"tome needs encoder\.groups.*pooled on their grid"):
        tokensieve.compress(model, "tome:output=tokens")
    with pytest.raises(
        MethodError, match=r"shortens the sequence inside the vision tower, so that encoder\.\S+ cannot"
    ):
        tokensieve.compress(model, "tome:output=unmerge+hiprune")
    with pytest.raises(SignalError, match="has no class token"):
        tokensieve.compress(model, "flowcut")
    tiled, _, _ = models("llava_next")
    with pytest.raises(MethodError, match="in front of layer 40"):
        tokensieve.compress(tiled, "flowcut:decoder_layer=40")


def test_failing_blocks_leave_the_tower_usable(models: Any) -> None:
    """An error in a method does not stay behind in the next pass."""
    model, _, inputs = models("llava")

    class Failing(tome.Tome):
        def tower_program(self, sample: Any) -> Any:
            raise MethodError("no schedule")

    with torch.no_grad():
        before = model(**inputs).logits
        with tokensieve.compress(model, Failing(0.5)), pytest.raises(MethodError, match="no schedule"):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, before)


def test_gradients_reach_the_first_block(models: Any) -> None:
    model, _, inputs = models("llava")
    weight = model.base_model.vision_tower.encoder.layers[0].mlp.fc1.weight
    with tokensieve.compress(model, "tome:retention=0.25"):
        model(**inputs).logits.sum().backward()
    gradient = weight.grad
    model.zero_grad()
    assert gradient is not None and float(gradient.abs().sum()) > 0


class _Block(nn.Module):
    """A block whose attention kernel calls itself flash attention."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = _Attention()
        self.layer_norm2, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        values = values + self.self_attn(values)
        return values + self.mlp(self.layer_norm2(values))


class _Attention(nn.Module):
    num_heads = 1
    config = type("Config", (), {"_attn_implementation": "flash_attention_2"})

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        shares = (self.q_proj(hidden_states) @ self.k_proj(hidden_states).transpose(1, 2)).softmax(-1)
        return shares @ self.v_proj(hidden_states)


class _Tower(nn.Module):
    config = type("Config", (), {"patch_size": 1})

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(), _Block()])

    def forward(self, pixel_values: Tensor) -> Any:
        values = pixel_values.flatten(2).transpose(1, 2)
        for layer in self.layers:
            values = layer(values)
        return type("Output", (), {"last_hidden_state": values})()


def test_kernels_without_bias_say_so() -> None:
    """Proportional attention needs a bias; without it merging works with every kernel."""
    tower, facts = _Tower(), HostFacts("toy", 4, 2, 1, False)
    pixels = torch.randn(2, 4, 3, 3)
    items = [EncodedItem(Layout.regular("image", 1, 3, 3), slice(i, i + 1)) for i in range(2)]
    for proportional in (False, True):
        stage = TowerStage(tower, PictureTower("layers"), facts, tome.Tome(0.5, proportional=proportional))
        stage.attach()
        groups: list[Tensor] = []
        stage.begin(EncodeCall("image", {"pixel_values": pixels}, items), lambda *found, to=groups: to.extend(found))
        try:
            if proportional:
                with pytest.raises(MethodError, match="flash attention cannot take"):
                    tower(pixels)
            else:
                assert tower(pixels).last_hidden_state.shape == (2, 9, 4)
                assert [int(row.unique().numel()) for row in groups[0]] == [4, 4]
                assert groups[1].tolist() == [[[9, 6], [6, 4]]] * 2
        finally:
            stage.detach()
    assert "forward" not in vars(tower)
