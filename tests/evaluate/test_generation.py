"""Intervals, paired comparisons, and generation on a tiny model."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import cross_entropy

from mmrecipes import data, evaluate, models
from mmrecipes.errors import ParityError, UserError
from mmrecipes.mini.model import make_model, make_processor
from mmrecipes.models.modules import clone


@pytest.fixture(scope="module")
def tiny():
    processor = make_processor()
    model = make_model(processor.tokenizer, width=128, vision_layers=1, language_layers=1).eval()
    model.processor = processor
    return model


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (950, 1000), (3, 7), (1, 4000)])
def test_wilson_is_scipys(right, n):
    share = evaluate.wilson(right, n)
    want = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert share.low == pytest.approx(want.low, abs=1e-4) and share.high == pytest.approx(want.high, abs=1e-4)


def test_wilson_covers_about_95_percent():
    rng = np.random.default_rng(0)
    hits = [s.low <= 0.9 <= s.high for s in (evaluate.wilson(int(k), 200) for k in rng.binomial(200, 0.9, 3000))]
    assert 0.93 < np.mean(hits) < 0.975


@pytest.mark.parametrize(("right", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_nonsense(right, n):
    with pytest.raises(UserError, match=f"{right} right of {n}"):
        evaluate.wilson(right, n)


def test_paired_is_mcnemar_and_sees_what_unpaired_intervals_miss():
    a = [True] * 950 + [False] * 50
    b = [False] * 20 + [True] * 930 + [False] * 50
    found = evaluate.paired(a, b)
    assert (found.lost, found.won, found.points) == (20, 0, pytest.approx(-2.0))
    assert found.p_value == pytest.approx(stats.binomtest(0, 20, 0.5).pvalue)
    assert found.high < 0  # the loss is certain
    one, two = evaluate.wilson(sum(a), 1000), evaluate.wilson(sum(b), 1000)
    assert two.high > one.low  # yet the unpaired intervals overlap


def test_paired_with_itself_is_nothing():
    same = evaluate.paired([True, False] * 50, [True, False] * 50)
    assert (same.points, same.low, same.high, same.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(("a", "b"), [([True], [True, False]), ([], [])])
def test_paired_needs_the_same_questions(a, b):
    with pytest.raises(UserError, match="same questions"):
        evaluate.paired(a, b)


def test_questions_needed_finds_the_gap_at_its_power():
    n, rng = evaluate.questions_needed(2, accuracy=0.9), np.random.default_rng(0)
    a, b = rng.binomial(n, 0.9, 2000) / n, rng.binomial(n, 0.88, 2000) / n
    z = (a - b) / np.sqrt(a * (1 - a) / n + b * (1 - b) / n)
    assert 0.75 < np.mean(z > 1.96) < 0.85
    assert evaluate.questions_needed(1, flips=0.02) < evaluate.questions_needed(1) / 4  # pairing is worth a lot


def test_questions_needed_in_pairs_finds_the_gap_at_its_power():
    n, rng = evaluate.questions_needed(2, flips=0.04), np.random.default_rng(0)
    lost, won, _ = rng.multinomial(n, [0.03, 0.01, 0.96], 2000).T / n
    z = (lost - won) / np.sqrt((lost + won - (lost - won) ** 2) / n)
    assert 0.75 < np.mean(z > 1.96) < 0.85


@pytest.mark.parametrize("given", [{"points": 0}, {"points": 96}, {"points": 5, "flips": 0.04}])
def test_questions_needed_refuses_a_loss_that_cannot_be(given):
    with pytest.raises(UserError, match="cannot be"):
        evaluate.questions_needed(**given)


def test_pairing_never_needs_more_questions_than_two_samples_of_the_same_two_models():
    for points in (1, 2, 5):  # the most that can differ by chance alone: answers independent of each other
        flips = 0.95 * (0.05 + points / 100) + 0.05 * (0.95 - points / 100)
        assert evaluate.questions_needed(points, flips=flips) == evaluate.questions_needed(points)


def test_score_counts_per_family_and_ignores_case():
    result = evaluate.score(["Yes", "red", "2"], ["yes", "blue", "2"], ["exists", "colour", "count"], {})
    assert result.overall.value == pytest.approx(2 / 3) and result.families["colour"].value == 0
    assert evaluate.agreement(["a", "b"], ["a", "c"]).value == 0.5


def test_batched_answers_are_those_of_one_by_one():
    model, rows = models.load("mini-vlm"), data.questions("validation", 28)
    together = evaluate.answers(model, rows["image"][:], rows["question"][:], batch_size=28)
    alone = evaluate.answers(model, rows["image"][:], rows["question"][:], batch_size=1)
    assert together == alone and len(set(together)) > 5


def test_outputs_that_are_not_finite_are_an_error_not_a_score(tiny):
    broken = clone(tiny)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(ParityError, match="not finite"):
        evaluate.vqa(broken, data.questions("validation", 7))


def test_answer_loss_of_a_random_model_is_near_uniform_and_ignores_padding(tiny):
    rows = data.questions("validation", 14)
    loss = cross_entropy(*evaluate.answer_logits(tiny, rows)).item()
    assert loss == pytest.approx(math.log(len(tiny.processor.tokenizer)), rel=0.25)
    assert loss == pytest.approx(cross_entropy(*evaluate.answer_logits(tiny, rows, batch_size=1)).item(), rel=1e-3)


@pytest.mark.parametrize("n", range(1, 200, 7))
def test_the_interval_holds_the_proportion_to_the_last_bit(n):
    for right in (0, 1, n - 1, n):
        share = evaluate.wilson(right, n)
        assert 0 <= share.low <= share.value <= share.high <= 1


def test_braces_in_a_question_stay_and_an_image_token_is_refused():
    processor = make_processor()
    (text,) = models.chat_prompts(processor, ["What is {} in {it}?"])
    assert "What is {} in {it}?" in text and text.count(processor.image_token) == 1
    assert processor.image_token not in models.chat_prompts(processor, ["What is it?"], images=0)[0]
    with pytest.raises(UserError, match="stands for an image"):
        models.chat_prompts(processor, [f"What is {processor.image_token}?"])
