"""Cutting for real: what is cut computes what the whole computes without it, and is a plain checkpoint afterwards."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

import mmrecipes as mmr
import tiny
from mmrecipes import data, evaluate, export, inference, models, prune, quantize
from mmrecipes.errors import UserError

KINDS = {"house": lambda: tiny.house(width=256, layers=2), "llava": lambda: two_layers()}


def two_layers():
    """The tiny LLaVA with two layers a tower and grouped-query attention: four heads on two key heads."""
    model = tiny.llava()
    config = model.config
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 4, 2
    config.text_config.head_dim = 16
    torch.manual_seed(0)
    fresh = type(model)(config).eval()
    fresh.processor = model.processor
    return fresh


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """Two architectures; the second is none of ours."""
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def rows():
    return data.calibration(7)


@torch.no_grad()
def logits(model):
    picture, asked = data.calibration(1)[0]["image"], "What colour is the circle?"
    return model(**models.chat(model, picture, asked)).logits


def assert_same(found, wanted):
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def halves(model, part):
    """Every other column of each layer's FFN: another half in each."""
    stack = models.layers(model)[part]
    width = models.ffn(stack[0])[1].in_features
    return [list(range(i % 2, width, 2)) for i in range(len(stack))]


# ---- what is cut


@pytest.mark.parametrize("part", models.TOWERS)
def test_columns_by_hand_and_by_torch_pruning_are_the_same(model, part):
    keep = halves(model, part)
    thin = prune.keep_ffn_neurons(model, {part: keep})
    for whole, cut, columns in zip(models.layers(model)[part], models.layers(thin)[part], keep, strict=True):
        (into, out), (into_cut, out_cut) = models.ffn(whole), models.ffn(cut)
        assert all(torch.equal(a.weight[columns], b.weight) for a, b in zip(into, into_cut, strict=True))
        assert torch.equal(out.weight[:, columns], out_cut.weight)
    assert models.config_of(thin, part).intermediate_size == len(keep[0])


def test_torch_prunings_graph_finds_the_same_cut():
    import torch_pruning as tp

    whole = tiny.house(width=256)
    for part, stack in models.layers(whole).items():
        cut, columns = models.clone(whole), halves(whole, part)[0]
        mlp = models.layers(cut)[part][0].mlp
        graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=torch.randn(1, 3, 256))
        first = models.ffn(models.layers(cut)[part][0])[0][0]
        gone = sorted(set(range(first.out_features)) - set(columns))
        graph.get_pruning_group(first, tp.prune_linear_out_channels, gone).prune()
        thin = models.layers(prune.keep_ffn_neurons(whole, {part: [columns]}))[part][0].mlp
        x = torch.randn(2, 5, 256)
        assert torch.equal(mlp(x), thin(x)) and not torch.equal(stack[0].mlp(x), thin(x))


@pytest.mark.parametrize("part", models.TOWERS)
def test_without_columns_that_count_for_nothing_the_answer_stays(model, part):
    quiet, keep = models.clone(model), halves(model, part)
    with torch.no_grad():
        for layer, columns in zip(models.layers(quiet)[part], keep, strict=True):
            out = models.ffn(layer)[1]
            out.weight[:, sorted(set(range(out.in_features)) - set(columns))] = 0
    assert_same(logits(prune.keep_ffn_neurons(quiet, {part: keep})), logits(quiet))


@pytest.mark.parametrize("keep", [[[0, 3], [1, 2]], [[2, 3], [0, 1]]], ids=["one of each group", "one group"])
def test_heads_respect_grouped_queries(model, keep):
    quiet, size = models.clone(model), models.head_dim(model, "language")
    with torch.no_grad():
        for layer, heads in zip(models.layers(quiet)["language"], keep, strict=True):
            for head in set(range(4)) - set(heads):
                models.attention(layer)[3].weight[:, head * size : (head + 1) * size] = 0
    thin = prune.keep_heads(quiet, keep)
    assert_same(logits(thin), logits(quiet))
    own = thin.config.text_config
    assert (own.num_attention_heads, own.num_key_value_heads) == ((2, 2) if keep[0] == [0, 3] else (2, 1))


@pytest.mark.parametrize("part", models.TOWERS)
def test_a_layer_that_adds_nothing_can_go(model, part):
    quiet = models.clone(model)
    with torch.no_grad():
        first = models.layers(quiet)[part][0]
        for m in (models.ffn(first)[1], models.attention(first)[3]):
            m.weight.zero_()
            if m.bias is not None:
                m.bias.zero_()
    similar = prune.similarity(quiet, data.calibration(2))[part]
    assert similar[0] > 0.9999 > similar[1]
    thin = prune.keep_layers(quiet, part, [1])
    assert_same(logits(thin), logits(quiet))
    assert models.config_of(thin, part).num_hidden_layers == 1


@pytest.mark.parametrize("part", models.TOWERS)
def test_width_is_cut_everywhere(model, part):
    width, size = models.config_of(model, part).hidden_size, models.head_dim(model, part)
    stack = models.layers(model)[part]
    heads = [[i] for i in range(len(stack))] if part == "vision" else []
    keep = list(range(0, width, width // size))[:size] if part == "vision" else list(range(0, width, 2))
    thin = prune.keep_hidden_channels(model, part, keep, heads)
    assert models.config_of(thin, part).hidden_size == len(keep)
    assert torch.isfinite(logits(thin)).all()
    whole_out, out = (models.ffn(models.layers(m)[part][0])[1].weight for m in (model, thin))
    assert torch.equal(out, whole_out[keep])
    if part == "language":
        assert torch.equal(thin.get_input_embeddings().weight, model.get_input_embeddings().weight[:, keep])


def test_the_pixel_shuffle_keeps_its_order():
    whole = tiny.house(width=256)
    config = whole.config
    config.scale_factor = 2
    whole = type(whole)(config).eval()
    keep = sorted(torch.randperm(256, generator=torch.Generator().manual_seed(0))[:64].tolist())
    thin = prune.keep_hidden_channels(whole, "vision", keep, [[0]])
    x = torch.randn(1, 64, 256)
    x[..., sorted(set(range(256)) - set(keep))] = 0
    assert_same(thin.model.connector(x[..., keep]), whole.model.connector(x))


def test_a_fit_makes_up_for_what_is_gone(house_vlm):
    whole, seen = mmr.load(house_vlm), data.calibration(21)
    reference, _ = evaluate.answer_logits(whole, probe := data.questions("validation", 21))
    keep = {"vision": prune.strongest(prune.magnitude_importance(whole)["vision"]["neurons"], 256)}
    plain, fitted = prune.keep_ffn_neurons(whole, keep), prune.keep_ffn_neurons(whole, keep, seen)
    far = [evaluate.divergence(reference, evaluate.answer_logits(m, probe)[0]) for m in (plain, fitted)]
    assert far[1] < far[0] / 2


def test_a_tied_head_stays_tied():
    whole = tiny.house(width=256)
    words = list(range(0, 256, 2))
    for thin in (prune.keep_layers(whole, "vision", [0]), prune.keep_hidden_channels(whole, "language", words)):
        assert thin.lm_head.weight is thin.get_input_embeddings().weight


# ---- importance


def test_importance_is_the_first_order_of_a_real_cut(model, rows):
    """The score of each structure, against the change of the loss when its output is scaled down a little."""
    found, one = prune.taylor_importance(model, rows.select([0])), rows.select([0])
    assert [tuple(v.shape) for v in found["language"].values()]
    part, step = "language", 1e-2

    def loss(m):
        return torch.nn.functional.cross_entropy(*evaluate.answer_logits(m, one), reduction="sum").double().item()

    for kind, column in (("neurons", 3), ("heads", 1)):
        moved = []
        for sign in (-1, 1):
            near = models.clone(model)
            layer = models.layers(near)[part][0]
            out, size = (
                (models.ffn(layer)[1], 1) if kind == "neurons" else (models.attention(layer)[3], models.head_dim(model, part))
            )
            with torch.no_grad():
                out.weight[:, column * size : (column + 1) * size] *= 1 + sign * 10 * step
            moved.append(loss(near))
        slope = abs(moved[1] - moved[0]) / (20 * step)
        assert found[part][kind][0, column].item() == pytest.approx(slope, rel=0.1, abs=2e-5)


def test_scores_have_a_shape_and_a_rank(model, rows):
    by_loss, by_size = prune.taylor_importance(model, rows), prune.magnitude_importance(model)
    for part, stack in models.layers(model).items():
        own = models.config_of(model, part)
        shapes = {"neurons": (len(stack), own.intermediate_size), "heads": (len(stack), own.num_attention_heads)}
        shapes |= {"layers": (len(stack),), "hidden": (own.hidden_size,)}
        for scores in (by_loss[part], by_size[part]):
            assert {k: tuple(v.shape) for k, v in scores.items()} == shapes
            assert all(torch.isfinite(v).all() and (v >= 0).all() for v in scores.values())


def test_magnitude_is_torch_prunings():
    import torch_pruning as tp

    whole = tiny.house(width=256)
    found = prune.magnitude_importance(whole)["language"]["neurons"][0]
    mlp = models.layers(whole)["language"][0].mlp
    graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=torch.randn(1, 3, 256))
    group = graph.get_pruning_group(mlp.up_proj, tp.prune_linear_out_channels, list(range(512)))
    library = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)(group)
    assert torch.allclose(found.square(), library, rtol=1e-4)


# ---- a plain checkpoint afterwards


@pytest.fixture(scope="module")
def cut(model):
    thin = prune.keep_ffn_neurons(model, {part: halves(model, part) for part in models.TOWERS})
    thin = prune.keep_heads(prune.keep_layers(thin, "vision", [1]), [[0, 3], [1, 2]])
    return prune.keep_hidden_channels(thin, "language", list(range(0, thin.config.text_config.hidden_size, 2)))


def test_a_cut_model_is_a_plain_checkpoint(cut, tmp_path):
    cut.save_pretrained(tmp_path)
    alone = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    alone.processor = cut.processor
    assert torch.equal(logits(alone), logits(cut))
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in cut.parameters())
    again = mmr.load(models.save(cut, cut.processor, tmp_path / "again", dtype=torch.float32))
    assert torch.equal(logits(again), logits(cut))
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["num_hidden_layers"] == 2


def test_a_cut_model_goes_through_int8(cut):
    small, slow = quantize.dynamic_int8(cut), quantize.simulate_dynamic_int8(cut)
    assert torch.isfinite(logits(small)).all()
    assert (logits(small) - logits(slow)).norm() < 0.15 * logits(slow).norm()


def test_a_cut_model_goes_through_export(cut, tmp_path):
    loaded = inference.load_exported(export.export(cut, tmp_path / "out", "onnx"))  # checks its logits against the model's
    assert isinstance(loaded.generate(data.calibration(1)[0]["image"], "How many objects?", 3), str)


# ---- what is refused


def test_a_head_of_a_vit_cannot_be_said_in_a_config(model):
    import torch_pruning as tp

    cut = models.clone(model)
    for layer in models.layers(cut)["vision"]:
        q, k, v, out = models.attention(layer)
        for m in (q, k, v):
            tp.prune_linear_out_channels(m, list(range(models.head_dim(model, "vision"))))
        tp.prune_linear_in_channels(out, list(range(models.head_dim(model, "vision"))))
    with pytest.raises(UserError, match="does not fit its config"):
        models.checkpoint_with_config(cut, cut.config)


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda m: prune.keep_layers(m, "vision", []), "at least one"),
        (lambda m: prune.keep_layers(m, "language", [1, 0]), "rising"),
        (lambda m: prune.keep_layers(m, "language", [0, 9]), "below 2"),
        (lambda m: prune.keep_ffn_neurons(m, {"vision": [[0, 1], [0]]}), "one number"),
        (lambda m: prune.keep_heads(m, [[0, 1, 2], [0, 1, 2]]), "as many of each key head"),
        (lambda m: prune.keep_heads(m, [[0, 1], [0, 2]]), "the same number in every layer"),
        (lambda m: prune.keep_hidden_channels(m, "vision", [0, 1, 2], [[0], [0]]), "must agree"),
    ],
)
def test_refusals_say_what_to_do(model, cut, said):
    with pytest.raises(UserError, match=said):
        cut(model)


def test_the_parent_stays_as_it_was(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prune.keep_ffn_neurons(model, {part: halves(model, part) for part in models.TOWERS})
    prune.keep_heads(model, [[0, 3], [1, 2]])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.text_config.num_attention_heads == 4
