"""Recovery: what was pruned or cut learns again, on any model; zeros stay zeros, a killed run goes on where it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tiny
from mmrecipes import data, distill, evaluate, models, prune, train
from mmrecipes.distill.kd import StudentWithProjections
from mmrecipes.errors import UserError
from mmrecipes.mini import curriculum

SHORT = train.TrainConfig(4, 4, 0.001, 3e-4, checkpoint_every=2)


@pytest.fixture(scope="module", params=[lambda: tiny.house(width=256, layers=2), lambda: tiny.llava(2)], ids=["house", "llava"])
def model(request):
    """Two architectures; the second is none of ours."""
    return request.param()


@pytest.fixture(scope="module")
def rows():
    return data.calibration(8)


def cut(model):
    """Without every other neuron of its FFNs."""
    keep = {}
    for part, stack in models.layers(model).items():
        size = models.ffn(stack[0])[1].in_features
        keep[part] = [list(range(i % 2, size, 2)) for i in range(len(stack))]
    return prune.keep_ffn_neurons(model, keep)


def answer_loss(model, rows):
    return F.cross_entropy(*evaluate.answer_logits(model, rows)).item()


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "with a teacher"])
def test_recovery_brings_a_cut_model_back(model, rows, taught):
    small, config = cut(model), train.TrainConfig(6, 8, 0.001, 3e-4)
    before = answer_loss(small, rows)
    better = distill.recover(small, train.RowBatches(small, rows, config), config, model if taught else None)
    assert answer_loss(better, rows) < before
    assert answer_loss(small, rows) == pytest.approx(before, rel=1e-4), "a copy is trained"


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "with a teacher"])
def test_every_zero_stays_and_the_loss_falls(model, rows, taught):
    sparse, config = prune.magnitude(model, 0.5), train.TrainConfig(12, 8, 0.01, 1e-3)
    batches = train.RowBatches(model, rows, config)
    tuned = distill.recover(sparse, batches, config, model if taught else None)
    assert prune.sparsity_of(tuned) == prune.sparsity_of(sparse) and not tuned.training
    with torch.no_grad():
        losses = [batches.answer_loss(m, batches[0])[0] for m in (sparse, tuned)]
    assert losses[1] < 0.98 * losses[0]


def test_a_cut_width_leaves_only_what_can_be_compared(rows, tmp_path):
    whole = tiny.house(layers=2)
    narrow = prune.slice_language(whole, 64, rows)
    distill.recover(narrow, train.RowBatches(narrow, rows, SHORT), SHORT, whole, tmp_path)
    assert {"answers", "logits", "vision"} < set(train.read_log(tmp_path)) and "hidden" not in train.read_log(tmp_path)


def test_a_model_is_no_distance_from_itself(model, rows):
    batches = train.RowBatches(model, rows, SHORT)
    loss = distill.distillation_loss(models.clone(model), distill.LossWeights(), batches.answer_loss)
    total, logs = loss(StudentWithProjections(model, model, learned=False), batches[0])
    assert abs(logs["logits"]) < 1e-5 and logs["vision"] < 1e-8 and logs["hidden"] < 1e-8
    assert total.item() == pytest.approx(logs["answers"], abs=1e-4)


def test_the_books_batches_and_a_broken_model():
    sparse, config = prune.magnitude(tiny.house(), 0.5), train.TrainConfig(2, 1)
    batches = curriculum.chat_batches("recovery", config, sparse.processor.tokenizer)
    tuned = distill.recover(sparse, batches, config)
    assert prune.sparsity_of(tuned) == prune.sparsity_of(sparse)
    name = next(n for n, _ in models.linears(sparse) if "text_model" in n)
    assert not torch.equal(tuned.get_submodule(name).weight, sparse.get_submodule(name).weight)
    with torch.no_grad():
        sparse.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="lower lr"):
        distill.recover(sparse, batches, config)


def test_a_killed_recovery_goes_on_where_it_was_with_its_zeros(rows, tmp_path, monkeypatch):
    whole = tiny.house(layers=2)
    small = prune.magnitude(prune.keep_layers(whole, "vision", [0]), 0.5)
    batches = train.RowBatches(small, rows, SHORT)
    wanted = distill.recover(small, batches, SHORT, whole)

    class Killed(Exception):
        pass

    class Dies(train.RowBatches):
        def __getitem__(self, i):
            if i == 3:
                raise Killed
            return super().__getitem__(i)

    with pytest.raises(Killed):
        distill.recover(small, Dies(small, rows, SHORT), SHORT, whole, tmp_path)
    found = distill.recover(small, batches, SHORT, whole, tmp_path)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))
    assert train.read_log(tmp_path)["step"] == [0, 1, 2, 3]
    again = distill.recover(small, batches, SHORT, whole, tmp_path)  # from its last checkpoint
    assert prune.sparsity_of(again) == prune.sparsity_of(found) == prune.sparsity_of(small)
    with pytest.raises(UserError, match="of another run"):
        distill.recover(small, batches, SHORT, None, tmp_path)
    with pytest.raises(UserError, match="cannot be resumed"):
        distill.recover(cut(small), batches, SHORT, whole, tmp_path)
