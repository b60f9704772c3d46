"""Cutting and distilling a Qwen2.5-VL, whose vision encoder differs from all others here: it works, or one line says why not."""

import pytest
import torch

from mmrecipes import data, distill, evaluate, models, prune, train
from mmrecipes.errors import UserError
from tests import families

CONFIG = train.TrainConfig(2, 4, 0.001, 1e-3)


@pytest.fixture(scope="module")
def model():
    return families.FAMILIES["qwen2_5_vl"]()


@pytest.fixture(scope="module")
def rows():
    return data.questions("train", 8)


def test_layers_neurons_and_heads_are_cut(model, rows):
    depth = {part: len(stack) for part, stack in models.layers(model).items()}
    half = {part: [list(range(32))] * n for part, n in depth.items()}
    for small in (
        prune.keep_layers(model, "language", [0]),
        prune.keep_layers(model, "vision", [0]),
        prune.keep_ffn_neurons(model, half, rows),
        prune.keep_heads(model, [[0, 1, 2, 3]] * depth["language"]),
    ):
        assert torch.isfinite(evaluate.answer_logits(small, rows)[0]).all()


def test_a_student_is_made_and_learns(model, rows):
    student = distill.make_student(model, {"language": distill.StudentSize((0,), 64, 32)}, rows)
    batches = train.RowBatches(model, rows, CONFIG)
    for weights in (distill.LossWeights(), distill.LossWeights(attention=1.0)):
        taught = distill.distill(student, model, batches, CONFIG, weights)
        assert not torch.equal(taught.lm_head.weight, student.lm_head.weight)
        assert torch.isfinite(evaluate.answer_logits(taught, rows)[0]).all()
    distill.recover(student, batches, CONFIG, model)


def test_what_does_not_work_is_refused_in_one_line(model, rows):
    depth = len(models.layers(model)["vision"])
    tried = {
        "no q_proj, k_proj, v_proj and o_proj": lambda: prune.keep_hidden_channels(model, "vision", range(32), [[0, 1]] * depth),
        "what was cut does not fit its config": lambda: prune.keep_hidden_channels(model, "language", range(32)),
        "9 lists for the": lambda: prune.keep_ffn_neurons(model, {"vision": [[0]] * 9}),
        "no q_proj": lambda: prune.taylor_importance(model, rows),
        "expected SigLIP's": lambda: distill.make_student(model, {"vision": distill.StudentSize((0,), 32, 32)}, rows),
        "takes images of many shapes; use distill": lambda: distill.match_vision_encoder(model, model, [], CONFIG),
    }
    for said, call in tried.items():
        with pytest.raises(UserError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
