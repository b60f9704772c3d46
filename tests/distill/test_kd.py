"""Distillation: the losses are what they say, a student is a smaller teacher, and training brings it nearer; on LLaVA, too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tiny
from mmrecipes import data, distill, evaluate, models, train
from mmrecipes.distill.kd import LossWeights
from mmrecipes.distill.students import StudentSize
from mmrecipes.errors import UserError
from mmrecipes.mini import curriculum
from tests import families

SIZES = {"vision": StudentSize((0,), 64, 100), "language": StudentSize((1,), 64, 60)}
CONFIG = train.TrainConfig(16, 4, 0.003, 1e-3)


@pytest.fixture(scope="module")
def rows():
    return data.questions("train", 16)


def test_soft_loss_is_kullback_leibler_both_ways():
    own, wanted = torch.randn(5, 7), torch.randn(5, 7)
    p, q = wanted.softmax(-1), own.softmax(-1)
    assert distill.kl_loss(own, wanted).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    back = distill.kl_loss(own, wanted, reverse=True).item()
    assert back == pytest.approx((q * (q / p).log()).sum(-1).mean().item(), rel=1e-5)
    assert distill.kl_loss(wanted, wanted, 4.0).item() == pytest.approx(0, abs=1e-6)


def test_temperature_keeps_the_size_of_the_gradient():
    own, wanted = torch.randn(50, 30, requires_grad=True), torch.randn(50, 30)
    sizes = []
    for temperature in (1.0, 8.0, 64.0):
        (slope,) = torch.autograd.grad(distill.kl_loss(own, wanted, temperature), own)
        sizes.append(slope.norm().item())
    assert 0.5 < sizes[1] / sizes[0] < 2 and sizes[2] == pytest.approx(sizes[1], rel=0.2)


def test_feature_loss_of_a_constant_is_one():
    wanted = torch.randn(4, 5, 6) * 3 + 1
    assert distill.feature_loss(wanted.mean().expand_as(wanted), wanted).item() == pytest.approx(1, abs=0.02)
    assert distill.feature_loss(wanted, wanted) == 0


def test_relation_loss_does_not_care_for_width_or_rotation():
    wanted = torch.randn(2, 6, 8)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    turned = torch.cat([wanted[..., :4] @ turn, wanted[..., 4:] @ turn], -1)
    assert distill.relation_loss(turned, wanted).item() == pytest.approx(0, abs=1e-5)
    assert distill.relation_loss(torch.randn(2, 6, 4), wanted) > 0.01


@pytest.mark.parametrize("inherit", [True, False])
def test_a_student_has_the_sizes_that_were_asked_for_and_is_a_plain_checkpoint(inherit, rows, tmp_path):
    teacher = tiny.house(layers=2)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = distill.make_student(teacher, SIZES, rows, inherit)
    for part, size in SIZES.items():
        own = models.config_of(student, part)
        assert (own.num_hidden_layers, own.hidden_size, own.intermediate_size) == (
            len(size.layers),
            size.hidden_size,
            size.intermediate_size,
        )
    models.save(student, teacher.processor, tmp_path / "student", dtype="auto")
    again = models.load(tmp_path / "student")
    answers = [evaluate.answers(m, [data.questions("test", 1)[0]["image"]], ["How many?"]) for m in (student, again)]
    assert answers[0] == answers[1]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()), "the teacher was changed"


def test_a_student_as_large_as_its_teacher_answers_as_it_does(rows):
    teacher = tiny.house(layers=2)
    vision, language = (models.config_of(teacher, p) for p in models.TOWERS)
    whole = {
        "vision": StudentSize((0, 1), 128, vision.intermediate_size),
        "language": StudentSize((0, 1), 128, language.intermediate_size),
    }
    same = distill.make_student(teacher, whole, rows)
    logits = [evaluate.answer_logits(m, rows)[0] for m in (teacher, same)]
    assert torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [
        ("vision", StudentSize((0,), 63, 60), "hidden size 63; expected a multiple of 2 up to 128"),
        ("language", StudentSize((0,), 256, 60), "hidden size 256; expected a multiple of 2 up to 128"),
        ("vision", StudentSize((0,), 64, 10_000), "intermediate size 10000 of vision; expected 1 to 512"),
        ("language", StudentSize((0, 5), 64, 60), "give rising indices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(part, size, message, rows):
    with pytest.raises(UserError, match=message):
        distill.make_student(tiny.house(), {part: size}, rows)


def test_a_llava_gets_a_smaller_language_model(rows):
    student = distill.make_student(tiny.llava(), {"language": StudentSize((0,), 16, 30)}, rows)
    assert student.config.text_config.hidden_size == 16
    assert torch.isfinite(evaluate.answer_logits(student, rows)[0]).all()
    with pytest.raises(UserError, match="expected SigLIP's vision encoder"):
        distill.make_student(tiny.llava(), {"vision": StudentSize((0,), 16, 30)}, rows)


@pytest.mark.parametrize("make", [lambda: tiny.house(layers=2), tiny.llava], ids=["house", "llava"])
@pytest.mark.parametrize(
    "weights", [LossWeights(answers=0), LossWeights(0, attention=1.0, reverse=True, temperature=2.0), distill.LABELS_ONLY]
)
def test_every_loss_is_learned_from_rows(make, weights, rows, tmp_path):
    teacher = make()
    torch.manual_seed(1)
    student = type(teacher)(teacher.config).eval()
    student.processor = teacher.processor
    before = [p.clone() for p in student.parameters()]
    batches = train.RowBatches(student, rows, CONFIG)
    small = distill.distill(student, None if weights == distill.LABELS_ONLY else teacher, batches, CONFIG, weights, tmp_path)
    found = train.read_log(tmp_path)
    learned = "logits" if weights.logits else "answers"
    assert found[learned][-1] < found[learned][0] and "answers" in found
    assert {k for k in ("logits", "hidden", "vision", "attention") if k in found} == {
        k for k in ("logits", "hidden", "vision", "attention") if getattr(weights, k)
    }
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)), "a copy is trained"
    if weights.logits:
        reference = evaluate.answer_logits(teacher, rows)[0]
        far = [evaluate.divergence(reference, evaluate.answer_logits(m, rows)[0]) for m in (student, small)]
        assert far[1] < 0.9 * far[0]


def test_projections_begin_as_the_best_linear_ones(rows):
    teacher = tiny.house(layers=2)
    student = distill.make_student(teacher, SIZES, rows)
    projected, batches = distill.StudentWithProjections(student, teacher), train.RowBatches(teacher, rows, CONFIG)
    loss = distill.distillation_loss(teacher, LossWeights(0, 0), batches.answer_loss)
    with torch.no_grad():
        before = loss(projected, batches[0])[1]
        projected.fit_projections_(teacher, batches.answer_loss, batches[0])
        after = loss(projected, batches[0])[1]
    assert after["vision"] < 0.5 * before["vision"] and after["hidden"] < 0.5 * before["hidden"] and after["hidden"] < 1


def test_text_alone_never_reaches_the_vision_encoder(rows, tmp_path):
    teacher, student = tiny.house(layers=2), tiny.house(seed=1)
    batches = train.RowBatches(student, rows.remove_columns("image"), CONFIG)
    small = distill.distill(student, teacher, batches, CONFIG, LossWeights(answers=0, vision=0), tmp_path)
    assert train.read_log(tmp_path)["logits"][-1] < train.read_log(tmp_path)["logits"][0]
    seen, words = (models.parts(m) for m in (student, small))
    assert all(torch.equal(a, b) for a, b in zip(seen["vision"].parameters(), words["vision"].parameters(), strict=True))
    moved = zip(seen["language"].parameters(), words["language"].parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in moved)


def test_the_books_batches_log_the_families(tmp_path):
    config = train.TrainConfig(2, 2)
    batches = curriculum.chat_batches("student", config, tiny.processor().tokenizer)
    distill.distill(tiny.house(), tiny.house(layers=2), batches, config, work=tmp_path)
    found = train.read_log(tmp_path)
    assert {"answers", "logits", "hidden", "vision", "colour", "reading"} <= set(found) and len(found["loss"]) == 2


def test_a_vision_encoder_learns_its_teachers_visual_tokens(tmp_path):
    teacher, student = tiny.house(layers=2), tiny.house(seed=1)
    config = train.TrainConfig(20, 4, 0.005, 1e-3)
    batches = curriculum.image_batches("student", config)
    small = distill.match_vision_encoder(student, teacher, batches, config, tmp_path)
    found = train.read_log(tmp_path)["features"]
    assert found[-1] < 0.8 * found[0]
    language = zip(models.parts(student)["language"].parameters(), models.parts(small)["language"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in language)
    with pytest.raises(UserError, match="visual tokens of 128 and 256 channels"):
        distill.match_vision_encoder(student, tiny.house(width=256), batches, config)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_its_logits(rows):
    model = tiny.house(layers=2)
    projected, batches = distill.StudentWithProjections(model, model), train.RowBatches(model, rows, CONFIG)
    loss = distill.distillation_loss(model, LossWeights(answers=0, hidden=0, vision=0), batches.answer_loss)
    assert loss(projected, batches[0])[0].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", [tiny.llava, families.FAMILIES["minicpmv4_6"]], ids=["llava", "minicpmv4_6"])
def test_the_answers_loss_of_rows_is_cross_entropy(make, rows):
    model = make()  # the second knows no logits_to_keep
    batches = train.RowBatches(model, rows, train.TrainConfig(9, 16))
    loss, tokens, _ = batches.answer_loss(model, batches[0])
    logits, wanted = evaluate.answer_logits(model, rows)
    assert tokens == len(wanted) and loss.item() == pytest.approx(F.cross_entropy(logits, wanted).item(), rel=1e-4)
    assert len(batches) == 9 and torch.equal(batches[8]["input_ids"], batches[0]["input_ids"]), "over and over"


def test_what_cannot_be_taught_is_refused(rows):
    model = tiny.house()
    with pytest.raises(UserError, match="needs a teacher"):
        distill.distill(model, None, train.RowBatches(model, rows, CONFIG), CONFIG, LossWeights())
    with pytest.raises(UserError, match="16 rows for batches of 32"):
        train.RowBatches(model, rows, train.TrainConfig(1, 32))
