"""A smaller dual encoder: what it takes from the larger one, what each loss says, and that training keeps to its bounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

import tiny
from mmrecipes import distill, models, train
from mmrecipes.data import families, scenes
from mmrecipes.errors import UserError
from mmrecipes.mini import curriculum, siglip
from mmrecipes.mini.labels import CaptionBatch

CONFIG = train.TrainConfig(6, 4, 0.003, 1e-3)


def batches_of(model, count=CONFIG.batch):
    """One batch of drawn scenes for the model's own processor, over and over."""
    drawn = [scenes.make_scene(seed) for seed in range(count)]
    longest = model.config.text_config.max_position_embeddings
    texts = {"padding": "max_length", "max_length": longest, "truncation": True, "return_tensors": "pt"}
    pixels = model.processor(images=[scenes.render(s) for s in drawn], return_tensors="pt")["pixel_values"]
    captions = [families.caption(s) for s in drawn], [families.hard_negative(s)[0] for s in drawn]
    ids = [model.processor(text=c, **texts)["input_ids"] for c in captions]
    unused = torch.zeros(count)
    return [CaptionBatch(pixels, *ids, unused, unused)] * CONFIG.steps


def house_batches(model):
    return curriculum.caption_batches("student", CONFIG, model.processor.tokenizer)


def two_layers():
    made = siglip.make_processor()
    model = siglip.make_siglip(len(made.tokenizer), 64, 2, 2).eval()
    model.processor = made
    return model


def vectors(seed: int, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=chance), torch.randn(2 * n, 8, generator=chance)


def test_a_student_inherits_layers_and_the_strongest_neurons(tmp_path):
    teacher = two_layers()
    student = distill.make_dual_student(teacher, {"vision": (1,), "language": (0,)}, {"vision": 100, "language": 30})
    models.save(student, teacher.processor, tmp_path / "s", dtype="auto")
    again, info = AutoModel.from_pretrained(tmp_path / "s", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert sum(p.numel() for p in again.parameters()) < 0.7 * sum(p.numel() for p in teacher.parameters())
    mine, theirs = student.vision_model.encoder.layers[0], teacher.vision_model.encoder.layers[1]
    assert torch.equal(mine.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
    strength = theirs.mlp.fc1.weight.square().sum(1) + theirs.mlp.fc2.weight.square().sum(0)
    kept = strength.topk(100).indices.sort().values
    assert torch.equal(mine.mlp.fc1.weight, theirs.mlp.fc1.weight[kept])
    assert torch.equal(mine.mlp.fc2.weight, theirs.mlp.fc2.weight[:, kept])
    with pytest.raises(UserError, match="intermediate size 10000 of vision"):
        distill.make_dual_student(teacher, {}, {"vision": 10_000})


def test_losses_are_nothing_for_a_student_that_is_its_teacher():
    own = vectors(0)
    assert distill.affinity_loss(own, own, 10.0).item() == pytest.approx(0, abs=1e-6)
    assert distill.embedding_loss(own, own).item() == pytest.approx(0, abs=1e-6)
    model = tiny.siglip_128()
    assert distill.interactive_loss(model, own, own).item() == pytest.approx(distill.pair_loss(model, *own).item(), rel=1e-5)


def test_affinity_is_kullback_leibler_over_texts_and_over_images():
    own, wanted = vectors(0), vectors(1)
    p, q = ((5 * F.normalize(i, dim=-1) @ F.normalize(t, dim=-1).T) for i, t in (wanted, own))
    over_texts = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()
    over_images = (p[:, :4].softmax(0) * (p[:, :4].log_softmax(0) - q[:, :4].log_softmax(0))).sum(0).mean()
    assert distill.affinity_loss(own, wanted, 5.0).item() == pytest.approx(((over_texts + over_images) / 2).item(), rel=1e-4)


def test_feature_loss_of_opposite_vectors_is_two():
    own = vectors(0)
    assert distill.embedding_loss(own, (-own[0], -own[1])).item() == pytest.approx(2, rel=1e-5)


def test_clips_loss_is_the_librarys():
    model = tiny.clip_128()
    drawn = [scenes.make_scene(seed) for seed in range(8)]
    images, texts = [scenes.render(s) for s in drawn], [families.caption(s) for s in drawn]
    inputs = model.processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs, return_loss=True).loss
        own = distill.embed(model, inputs["pixel_values"]), distill.embed(model, ids=inputs["input_ids"])
        assert distill.pair_loss(model, *own).item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("make", [tiny.siglip_128, tiny.clip_128], ids=["siglip", "clip"])
@pytest.mark.parametrize("weights", [distill.ContrastiveWeights(), distill.CONTRAST_ONLY], ids=["taught", "alone"])
def test_a_student_learns_from_pairs(make, weights, tmp_path):
    teacher, student = make(), make()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in models.parts(student)["vision"].parameters():
            p.add_(0.02 * torch.randn_like(p))
    batches, teacher = batches_of(student), None if weights == distill.CONTRAST_ONLY else teacher
    small = distill.distill_dual(student, teacher, batches, CONFIG, weights, tmp_path)
    found = train.read_log(tmp_path)
    assert found["loss"][-1] < found["loss"][0]
    assert ("affinity" in found) == (weights != distill.CONTRAST_ONLY)
    assert not all(torch.equal(a, b) for a, b in zip(small.parameters(), student.parameters(), strict=True))


def test_what_was_rounded_or_zeroed_stays_so():
    model = tiny.siglip_128()
    chosen = distill.set_trainable(model.requires_grad_(False), {"vision": "small", "language": "nothing"})
    assert chosen.logit_scale.requires_grad and not any(p.requires_grad for p in model.parameters()), "a copy is changed"
    trained = distill.distill_dual(chosen, None, house_batches(model), CONFIG)
    before, after = (dict(models.parts(m)["vision"].named_parameters()) for m in (model, trained))
    same = {name: torch.equal(p, after[name]) for name, p in before.items()}
    assert all(same[name] == (p.ndim >= 2) for name, p in before.items() if "k_proj.bias" not in name)
    texts = zip(models.parts(model)["language"].parameters(), models.parts(trained)["language"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in texts)


def test_a_run_with_other_losses_or_parameters_is_not_resumed(tmp_path):
    model = tiny.siglip_128()
    config = train.TrainConfig(1, 2)
    batches = curriculum.caption_batches("student", config, model.processor.tokenizer)
    distill.distill_dual(model, None, batches, config, work=tmp_path)
    with pytest.raises(UserError, match="of another run"):
        distill.distill_dual(model, model, batches, config, work=tmp_path)
    with pytest.raises(UserError, match="of another run"):
        distill.distill_dual(distill.set_trainable(model, {"vision": "small"}), None, batches, config, work=tmp_path)


def test_what_cannot_be_taught_is_refused():
    model = tiny.siglip_128()
    with pytest.raises(UserError, match="needs a teacher"):
        distill.distill_dual(model, None, house_batches(model), CONFIG, distill.ContrastiveWeights())
    with pytest.raises(UserError, match="'most' of 'vision'; expected all, small, nothing"):
        distill.set_trainable(model, {"vision": "most"})
    with pytest.raises(UserError, match="say what learns with set_trainable"):
        distill.distill_dual(model.requires_grad_(False), None, house_batches(model), CONFIG)
    larger = siglip.make_siglip(len(model.processor.tokenizer), 128, 1, 1)
    with pytest.raises(UserError, match="embeddings of 64 and 128 numbers"):
        distill.distill_dual(tiny.siglip_128(), larger, house_batches(model), CONFIG)
