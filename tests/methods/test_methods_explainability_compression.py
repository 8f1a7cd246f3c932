"""Relevance labels, the mapper that learns them, and the method that uses it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.hosts import host_for, tiny
from tokensieve.methods.explainability_compression import (
    ExplainabilityCompression,
    MapperConfig,
    RelevanceMapper,
    relevance_loss,
    relevance_target,
)
from tokensieve.methods.explainability_compression.dataset import LabelFolder, LabelledPrompt, agrees, make_labels
from tokensieve.methods.explainability_compression.labels import Label, answer, label, rollout_step
from tokensieve.methods.explainability_compression.method import ATTENTION
from tokensieve.methods.explainability_compression.training import STATE, Settings, train

SMALL = MapperConfig(channels=(16, 32))


@pytest.fixture(scope="module")
def models() -> Any:
    """Model, processor and inputs of one prompt of a family, loaded once."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    cache: dict[str, tuple[Any, Any, dict[str, torch.Tensor]]] = {}

    def get(family: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
        if family not in cache:
            model, processor = tiny.load(family)
            if family == "video_llama_3":
                processor.video_processor.use_token_compression = False
            cache[family] = (model.eval(), processor, dict(tiny.example_inputs(family, processor)))
        return cache[family]

    return get


# -- labels --------------------------------------------------------------------------------------------------------


def test_rollout_of_one_layer_by_hand() -> None:
    """One layer and one head: the row of ``I + (A * grad A)^+``; several heads clip before their mean."""
    attention = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    gradient = torch.tensor([[[2.0, 5.0], [4.0, -1.0]]])
    row = rollout_step(torch.tensor([0.0, 1.0]), attention, gradient)
    assert row.tolist() == [1.0, 1.0]
    both = rollout_step(torch.tensor([0.0, 1.0]), attention.expand(2, 2, 2), torch.cat((gradient, -gradient)))
    assert both.tolist() == [0.5, 1.0 + 0.375]
    still = rollout_step(torch.tensor([0.0, 1.0]), attention, torch.zeros(1, 2, 2))
    assert still.tolist() == [0.0, 1.0]


def _brute_force(model: Any, inputs: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean last row of R over the answer tokens, each prefix run anew with all maps and whole matrices."""
    layers = host_for(model).layers(model.base_model)
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    length = inputs["input_ids"].shape[1]
    total = torch.zeros(length + len(ids) - 1)
    for step in range(len(ids)):
        longer = dict(inputs)
        for name, value in inputs.items():
            if name == "input_ids":
                longer[name] = torch.cat((value, ids[None, :step]), 1)
            elif name in ("attention_mask", "mm_token_type_ids"):
                fill = 1 if name == "attention_mask" else 0
                longer[name] = torch.cat((value, value.new_full((1, step), fill)), 1)
        maps: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.register_forward_hook(lambda module, args, output, to=maps: to.append(output[1]))
            for layer in layers
        ]
        logit = model(**longer, use_cache=False).logits[0, -1, ids[step]]
        for hook in hooks:
            hook.remove()
        rollout = torch.eye(length + step)
        for weights, gradient in zip(maps, torch.autograd.grad(logit, maps), strict=True):
            rollout = rollout + (weights.detach() * gradient)[0].clamp(min=0).mean(0) @ rollout
        total[: length + step] += rollout[-1]
    model.set_attn_implementation(kernel)
    return total / len(ids)


@pytest.mark.parametrize("family", ["llava_next", "llava_video", "qwen3_vl", "internvl", "video_llama_3"])
def test_labels_equal_whole_matrices(models: Any, family: str) -> None:
    """Vectors carried through a checkpointed backward pass equal matrices of all layers, token by token."""
    model, _, inputs = models(family)
    ids = answer(model, inputs, 2)
    before = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    (found,) = label(model, inputs, ids)
    (kept,) = label(model, inputs, ids, recompute=False)
    assert torch.equal(found.relevance, kept.relevance)
    expected = _brute_force(model, inputs, ids)
    tokens = {getattr(model.config, f"{name}_token_id", None) for name in ("image", "video")} - {None}
    places = torch.isin(inputs["input_ids"][0], torch.tensor(sorted(tokens))).nonzero()[:, 0]
    with torch.no_grad(), tokensieve.compress(model, "uniform:retention=0.5") as run:
        model(**inputs)
    layout = run.history[0].items[0].layout
    assert found.kind == layout.kind
    torch.testing.assert_close(found.relevance, expected[places[layout.patch_tokens]], rtol=1e-4, atol=1e-7)
    assert float(found.relevance.sum()) > 0
    assert [(name, sorted(vars(module))) for name, module in model.named_modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa" and not model.training


def test_gradients_by_finite_differences(models: Any) -> None:
    """The step of one layer from differences of the logit when entries of its map are changed."""
    model, _ = tiny.build_in_memory("llava", text={"num_hidden_layers": 1})
    model = model.double()
    processor = models("llava")[1]
    inputs = dict(tiny.example_inputs("llava", processor))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    token = torch.tensor([77])
    (found,) = label(model, inputs, token, recompute=False)
    model.set_attn_implementation("eager")
    attention = host_for(model).layers(model.base_model)[0].self_attn
    values: list[torch.Tensor] = []
    hook = attention.v_proj.register_forward_hook(lambda module, args, output: values.append(output))
    maps: list[torch.Tensor] = []
    second = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    with torch.no_grad():
        model(**inputs)
    hook.remove(), second.remove()
    group = attention.num_key_value_groups
    heads = values[0][0].unflatten(1, (-1, attention.head_dim)).transpose(0, 1).repeat_interleave(group, 0)
    place = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[5])

    def logit(head: int, change: float) -> float:
        """Logit of the token when the last row of one head looks a little more at one place."""
        shift = torch.zeros(heads.shape[0], attention.head_dim, dtype=torch.float64)
        shift[head] = change * heads[head, place]

        def moved(module: Any, args: Any) -> Any:
            mixed = args[0].clone()
            mixed[0, -1] += shift.flatten()
            return (mixed,)

        handle = attention.o_proj.register_forward_pre_hook(moved)
        with torch.no_grad():
            value = float(model(**inputs).logits[0, -1, 77])
        handle.remove()
        return value

    total = 0.0
    for head in range(heads.shape[0]):
        # Norms run in float32 whatever the dtype, so that smaller steps drown in rounding.
        gradient = (logit(head, 1e-2) - logit(head, -1e-2)) / 2e-2
        total += max(0.0, gradient * float(maps[0][0, head, -1, place])) / heads.shape[0]
    assert float(found.relevance[5]) == pytest.approx(total, rel=1e-3)


def test_labels_of_several_items(models: Any) -> None:
    """Videos and images of one prompt each get a label, in order."""
    model, processor, _ = models("llava_onevision")
    inputs = dict(tiny.example_inputs("llava_onevision", processor, videos=1, images=1))
    found = label(model, inputs, torch.tensor([77, 78]))
    with torch.no_grad(), tokensieve.compress(model, "uniform:retention=0.5") as run:
        model(**inputs)
    assert [one.kind for one in found] == [item.layout.kind for item in run.history[0].items]
    assert [one.relevance.numel() for one in found] == [item.layout.patches for item in run.history[0].items]


def test_labels_refuse_what_they_cannot_explain(models: Any) -> None:
    model, processor, inputs = models("llava_onevision")
    with pytest.raises(MethodError, match="0 answer tokens"):
        label(model, inputs, torch.empty(0, dtype=torch.long))
    with pytest.raises(MethodError, match="not for 2 prompts"):
        label(model, dict(tiny.example_inputs("llava_onevision", processor, batch=2)), torch.tensor([5]))
    with tokensieve.compress(model, "uniform"), pytest.raises(MethodError, match="detach its method"):
        label(model, inputs, torch.tensor([5]))


# -- target, network, loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_target_keeps_the_upper_half(count: int) -> None:
    relevance = torch.rand(count, generator=torch.Generator().manual_seed(count)) + 0.1
    target = relevance_target(relevance)
    assert float(target.sum()) == pytest.approx(1.0)
    assert int((target > 0).sum()) == -(-count // 2)
    kept = target > 0
    torch.testing.assert_close(target[kept], relevance[kept] / relevance[kept].sum())
    assert relevance_target(torch.zeros(count)).tolist() == pytest.approx([1 / count] * count)


@pytest.mark.parametrize("length", [1, 7, 196, 5000])
def test_prediction_sums_to_one_at_any_length(length: int) -> None:
    mapper = RelevanceMapper().eval()
    attention = torch.rand(length, generator=torch.Generator().manual_seed(0)) / length
    scores = mapper.score(attention)
    assert scores.shape == (length,) and float(scores.sum()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(mapper.score(attention * 1e-3), scores, rtol=1e-3, atol=1e-7)
    assert 170_000 < sum(parameter.numel() for parameter in mapper.parameters()) < 190_000


def test_loss_is_the_divergence() -> None:
    target = torch.tensor([[0.0, 0.25, 0.75]])
    predicted = torch.tensor([[0.5, 0.25, 0.25]])
    expected = 0.75 * torch.tensor(3.0).log()
    torch.testing.assert_close(relevance_loss(target, predicted.log()), expected)
    assert float(relevance_loss(predicted, predicted.log())) == pytest.approx(0.0, abs=1e-7)


def _blurred(count: int, lengths: tuple[int, ...], seed: int = 0) -> list[Label]:
    """Labels whose relevance is the attention, blurred."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        attention = torch.rand(lengths[i % len(lengths)], generator=generator) ** 4
        padded = torch.nn.functional.pad(attention[None, None], (1, 1), mode="replicate")
        blurred = torch.nn.functional.avg_pool1d(padded, 3, 1)[0, 0]
        found.append(Label("video", attention, blurred))
    return found


def test_training_learns_a_blur() -> None:
    """Some 100 steps bring the divergence down by more than four fifths, and serve sequences of other lengths."""
    labels = _blurred(24, (48, 32))
    trained = train(labels, SMALL, Settings(epochs=30, batch=6, learning_rate=1e-2, held_out=0.25))
    with torch.no_grad():
        uniform = [
            float(relevance_loss(relevance_target(one.relevance)[None], torch.full((1, n), 1 / n).log()))
            for one in labels
            if (n := one.attention.numel())
        ]
    assert trained.best.held_out_loss < 0.2 * sum(uniform) / len(uniform)
    assert trained.best.overlap > 0.85
    longer = _blurred(1, (400,), seed=9)[0]
    predicted = trained.mapper.score(longer.attention)
    assert torch.corrcoef(torch.stack((predicted, longer.relevance)))[0, 1] > 0.8


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    labels = _blurred(10, (12, 9))
    whole = train(labels, SMALL, Settings(epochs=5, batch=4))
    part = train(labels, SMALL, Settings(epochs=2, batch=4), folder=tmp_path)
    assert len(part.epochs) == 2
    seen: list[int] = []
    resumed = train(
        labels, SMALL, Settings(epochs=5, batch=4), folder=tmp_path, progress=lambda epoch: seen.append(epoch.number)
    )
    assert seen == [3, 4, 5] and resumed.epochs == whole.epochs
    for name, value in whole.mapper.state_dict().items():
        assert torch.equal(resumed.mapper.state_dict()[name], value)
    stored = RelevanceMapper.load(tmp_path)
    torch.testing.assert_close(stored.score(labels[0].attention), whole.mapper.score(labels[0].attention))
    with pytest.raises(MethodError, match="other settings or labels"):
        train(labels, SMALL, Settings(epochs=5, batch=3), folder=tmp_path)
    (tmp_path / STATE).write_bytes(b"broken")
    with pytest.raises(MethodError, match="cannot be gone on with"):
        train(labels, SMALL, Settings(epochs=5, batch=4), folder=tmp_path)


def test_training_refuses_nonsense() -> None:
    with pytest.raises(MethodError, match="no labels of more than one token"):
        train([Label("image", torch.ones(1), torch.ones(1))], SMALL)
    with pytest.raises(MethodError, match="at least one epoch"):
        Settings(epochs=0)


def _attentive() -> tuple[Any, Any]:
    """A tiny model of one layer and head whose queries share a preference and whose values share a direction.

    With weights drawn at random the sign of every value's effect is random too, and nothing could be learnt.
    """
    text = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model, processor = tiny.build_in_memory("llava_onevision", text=text)
    attention = host_for(model).layers(model.base_model)[0].self_attn
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        attention.q_proj.weight.mul_(0.2)
        attention.q_proj.bias.copy_(torch.randn(attention.q_proj.bias.shape, generator=generator))
        attention.v_proj.bias.copy_(3 * torch.randn(attention.v_proj.bias.shape, generator=generator))
    return model.eval(), processor


def test_mapper_learns_a_models_relevance(tmp_path: Path) -> None:
    """From labels of a model on disk to held-out predictions better than chance, and to a compressed run."""
    model, processor = _attentive()
    prompts = [
        LabelledPrompt(dict(tiny.example_inputs("llava_onevision", processor, seed=i, frames=2))) for i in range(12)
    ]
    folder = LabelFolder(tmp_path / "labels")
    assert make_labels(model, prompts, folder, max_new_tokens=1, recompute=False, name="tiny") == 12
    labels, facts = folder.load("video")
    assert len(labels) == 12 and facts == {"host": "llava_onevision", "decoder_layers": "1", "model": "tiny"}
    config = dataclasses.replace(SMALL, host="llava_onevision", decoder_layers=1, modality="video")
    settings = Settings(epochs=15, batch=3, learning_rate=3e-3, held_out=0.34)
    trained = train(labels, config, settings, folder=tmp_path / "mapper")
    size = labels[0].attention.numel()
    uniform = [
        float(relevance_loss(relevance_target(one.relevance)[None], torch.full((1, size), 1 / size).log()))
        for one in labels
    ]
    assert trained.best.held_out_loss < 0.85 * sum(uniform) / len(uniform)
    assert trained.best.overlap > 0.58
    inputs = prompts[0].inputs
    with torch.no_grad(), tokensieve.compress(model, f"{NAME}:retention=0.4,weights={tmp_path / 'mapper'}") as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    keep = run.history[0].items[0].keep
    expected = trained.mapper.score(labels[0].attention).topk(keep.numel()).indices.sort().values
    assert torch.equal(keep, expected) and keep.numel() == round(0.4 * size)


NAME = "explainability-compression"

# -- the folder of labels ------------------------------------------------------------------------------------------


def test_labels_go_on_and_leave_wrong_answers_out(models: Any, tmp_path: Path) -> None:
    model, processor, inputs = models("llava_onevision")
    tokenizer = processor.tokenizer
    given = tokenizer.decode(answer(model, inputs, 2))
    prompts = [LabelledPrompt(inputs, given), LabelledPrompt(inputs, "certainly not"), LabelledPrompt(inputs)]
    folder = LabelFolder(tmp_path)
    seen: list[tuple[int, bool]] = []
    options: dict[str, Any] = {
        "max_new_tokens": 2,
        "decode": tokenizer.decode,
        "progress": lambda number, made: seen.append((number, made)),
    }
    assert make_labels(model, prompts[:1], folder, **options) == int(agrees(given, given))
    make_labels(model, prompts, folder, **options)
    assert [number for number, _ in seen] == [0, 1, 2]
    assert dict(seen)[1] is False and dict(seen)[2] is True
    labels, _ = folder.load()
    assert all(float(one.relevance.sum()) > 0 for one in labels)
    with pytest.raises(MethodError, match="no labels of image items"):
        folder.load("image")
    with pytest.raises(MethodError, match="pass decode="):
        make_labels(model, [LabelledPrompt(inputs, "x")], LabelFolder(tmp_path / "other"))
    broken = tmp_path / "000005.safetensors"
    broken.write_bytes(b"broken")
    with pytest.raises(MethodError, match="cannot be read as labels"):
        folder.load()
    broken.unlink()
    folder.add(9, labels[:1], {"host": "other", "decoder_layers": "5", "model": ""})
    with pytest.raises(MethodError, match="several models"):
        folder.load()


@pytest.mark.parametrize(
    ("given", "reference", "right"),
    [
        ("A red car.", "red car", True),
        ("It is RED", "red", True),
        ("reddish", "red", False),
        ("B. the dog", "B", True),
        ("the letter B", "B", False),
        ("", "", False),
    ],
)
def test_answers_agree_up_to_case_and_punctuation(given: str, reference: str, right: bool) -> None:
    assert agrees(given, reference) is right


# -- signal and method ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_first_attention_equals_the_eager_layer(models: Any, family: str) -> None:
    """Norm and projections of one layer alone give its map, for every row of a padded batch."""
    model, processor, _ = models(family)
    inputs = tiny.example_inputs(family, processor, batch=2)
    seen: list[torch.Tensor] = []

    class Spy(ExplainabilityCompression):
        def check_host(self, facts: Any) -> None:
            pass

        def select(self, sample: TokenSample, count: int) -> torch.Tensor:
            seen.append(sample.signal(ATTENTION))
            return torch.arange(count)

    with torch.no_grad(), tokensieve.compress(model, Spy(0.5)) as run:
        model(**inputs)
    maps: list[torch.Tensor] = []
    model.set_attn_implementation("eager")
    layer = run.host.layers(model.base_model)[0]
    hook = layer.self_attn.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    model.set_attn_implementation("sdpa")
    tokens = {getattr(model.config, f"{name}_token_id", None) for name in ("image", "video")} - {None}
    visual = torch.isin(inputs["input_ids"], torch.tensor(sorted(tokens)))
    for row, item in enumerate(run.history[0].items):
        places = visual[row].nonzero()[:, 0]
        attention = maps[0][row, :, int(places[-1]) + 1 :].mean((0, 1))
        torch.testing.assert_close(seen[row], attention[places[item.layout.patch_tokens]], rtol=1e-5, atol=1e-7)


def test_first_attention_of_a_later_turn(models: Any) -> None:
    """A second video on a kept cache: earlier turns take part in the softmax."""
    from transformers import DynamicCache

    model, _, inputs = models("llava_onevision")
    shares = []

    class Spy(ExplainabilityCompression):
        def check_host(self, facts: Any) -> None:
            pass

        def select(self, sample: TokenSample, count: int) -> torch.Tensor:
            shares.append(float(sample.signal(ATTENTION).sum()))
            return torch.arange(count)

    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), tokensieve.compress(model, Spy(0.5)):
        model(**inputs, past_key_values=cache)
        seen = cache.get_seq_length()
        again = dict(inputs)
        again["attention_mask"] = torch.ones(1, seen + inputs["input_ids"].shape[1], dtype=torch.long)
        model(**again, past_key_values=cache)
    assert 0 < shares[1] < shares[0]


def _write(folder: Path, **options: Any) -> str:
    RelevanceMapper(dataclasses.replace(SMALL, **options)).save(folder)
    return str(folder)


def test_mapper_belongs_to_a_model(models: Any, tmp_path: Path) -> None:
    model, processor, inputs = models("llava_onevision")
    with pytest.raises(MethodError, match="needs a mapper that was trained for this model"):
        tokensieve.compress(model, NAME)
    other = _write(tmp_path / "other", host="qwen2_vl", decoder_layers=5)
    with pytest.raises(MethodError, match="trained for qwen2_vl with 5 layers, but this model is llava_onevision"):
        tokensieve.compress(model, NAME, weights=other)
    video = _write(tmp_path / "video", modality="video")
    both = dict(tiny.example_inputs("llava_onevision", processor, videos=1, images=1))
    with torch.no_grad(), tokensieve.compress(model, NAME, weights=video) as run:
        model(**inputs)
        with pytest.raises(MethodError, match="no mapper for images"):
            model(**both)
    assert run.history[0].items[0].keep.numel() == 25
    image = _write(tmp_path / "image", modality="image")
    with torch.no_grad(), tokensieve.compress(model, NAME, weights=video, image_weights=image) as run:
        model(**both)
    assert len(run.history[0].items) == 2


def test_methods_that_need_weights_are_not_offered(models: Any) -> None:
    model, _, _ = models("llava_onevision")
    assert NAME in tokensieve.list_methods()
    from tokensieve.core.registry import fitting_methods

    assert NAME not in fitting_methods(host_for(model), model.base_model)


def test_selection_follows_the_mapper() -> None:
    class Falling(torch.nn.Module):
        config = MapperConfig()

        def score(self, attention: torch.Tensor) -> torch.Tensor:
            return -attention

    method = ExplainabilityCompression(0.5)
    method._mapper = method._for_images = Falling()  # type: ignore[assignment]
    attention = torch.tensor([0.3, 0.1, 0.2, 0.4])
    sample = TokenSample(torch.zeros(4, 2), Layout.regular("image", 1, 2, 2), {ATTENTION: attention})
    assert method.plan_tokens(sample).keep.tolist() == [1, 2]


# -- files ---------------------------------------------------------------------------------------------------------


def test_mappers_on_disk(tmp_path: Path) -> None:
    mapper = RelevanceMapper(dataclasses.replace(SMALL, host="llava", decoder_layers=3, modality="image", model="x"))
    mapper.save(tmp_path)
    again = RelevanceMapper.load(tmp_path)
    assert again.config == mapper.config
    attention = torch.rand(9)
    assert torch.equal(again.score(attention), mapper.eval().score(attention))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not of the format"),
        ({"channels": [16, 0]}, "1 to 8192 channels"),
        ({"channels": [16, 48]}, "do not fit its configuration"),
        ({"kernel": 4}, "odd kernel"),
        ({"modality": "sound"}, "use image, video, any"),
        ({"decoder_layers": "many"}, "lacks an entry or has a wrong one"),
    ],
)
def test_broken_mappers(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    RelevanceMapper(SMALL).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MethodError, match=message):
        RelevanceMapper.load(tmp_path)


def test_missing_mappers(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="holds no mapper"):
        ExplainabilityCompression(weights=str(tmp_path))
    RelevanceMapper(SMALL).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 10)
    with pytest.raises(MethodError, match="cannot be read as safetensors"):
        RelevanceMapper.load(tmp_path)
