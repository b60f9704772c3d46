"""FFN neurons are cut in families whose FFNs or configs have shapes of their own, or one line says why not."""

import pytest
import torch

from mmrecipes import data, distill, models, prune, train
from mmrecipes.errors import UserError
from mmrecipes.prune import structured
from tests import families

NAMES = ("idefics2", "qwen2_vl", "qwen3_vl", "qwen3_5", "internvl", "minicpmv4_6", "blip2")


@pytest.fixture(scope="module")
def row():
    return data.questions("train", 4, size=64)[0]


@torch.no_grad()
def logits(model, row):
    return model(**models.chat(model, row["image"], row["question"])).logits


@pytest.mark.parametrize("part", models.TOWERS)
@pytest.mark.parametrize("name", NAMES)
def test_without_neurons_that_count_for_nothing_the_answer_stays(name, part, row):
    model = models.clone(families.FAMILIES[name]()).double()  # sums of other lengths, in other orders: rounding must not decide
    stack, tied = models.layers(model)[part], structured.tied_ffn(model, part)
    with torch.no_grad():
        for held in [*stack, *([tied] if tied is not None else [])]:
            into, out = models.ffn(held)
            for matrix in into:
                matrix.weight[::2] = 0  # of a tied FFN the neurons with the largest weights stay
            out.weight[:, ::2] = 0
    width = models.ffn(stack[0])[1].in_features
    small = prune.keep_ffn_neurons(model, {part: [range(1, width, 2)] * len(stack)})
    assert models.ffn(models.layers(small)[part][0])[1].in_features == width // 2
    torch.testing.assert_close(logits(small, row), logits(model, row), rtol=1e-9, atol=1e-9)


def test_a_number_that_the_config_cannot_say_is_refused():
    model = families.FAMILIES["qwen2_vl"]()
    depth = len(models.layers(model)["vision"])
    with pytest.raises(UserError, match=r"100 FFN neurons: Qwen2VLVisionConfig has a whole ratio .* a multiple of 64"):
        prune.keep_ffn_neurons(model, {"vision": [range(100)] * depth})


@pytest.mark.parametrize("name", ["qwen3_5", "minicpmv4_6"])
def test_queries_that_come_with_a_gate_have_no_heads_to_cut(name):
    model = families.FAMILIES[name]()
    assert set(prune.magnitude_importance(model)["language"]) == {"neurons", "layers"}
    layer = next(x for x in models.layers(model)["language"] if hasattr(x, "self_attn"))
    with pytest.raises(UserError, match="o_proj of its heads alone"):
        models.attention(layer)


def test_an_encoder_decoder_is_refused():
    model = families.FAMILIES["florence2"]()
    calls = {
        "scores": lambda: prune.magnitude_importance(model),
        "layers": lambda: prune.keep_layers(model, "language", [0]),
        "zeros": lambda: prune.sparsegpt(model, data.questions("train", 2, size=64), 0.5),
        "student": lambda: distill.StudentWithProjections(model, model),
    }
    for call in calls.values():
        with pytest.raises(UserError, match="Florence2ForConditionalGeneration is an encoder-decoder, and only decoders"):
            call()


@pytest.mark.parametrize("name", ["minicpmv4_6", "internvl"])
def test_a_shallower_student_learns(name):
    model, config = families.FAMILIES[name](), train.TrainConfig(2, 4, 1e-3, 1e-3)
    rows = data.questions("train", 8, size=64)
    student = prune.keep_layers(model, "language", range(len(models.layers(model)["language"]) - 1))
    taught = distill.distill(student, model, train.RowBatches(model, rows, config), config)
    assert not torch.equal(taught.lm_head.weight, student.lm_head.weight)
    assert torch.isfinite(logits(taught, rows[0])).all()
