"""Adapters: they begin as nothing, learn alone, merge into the same function, and stand beside 4-bit and pruned matrices."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from mmrecipes import data, evaluate, models, prune, quantize, train
from mmrecipes.errors import ParityError, UserError
from mmrecipes.mini import curriculum

CONFIG = train.TrainConfig(6, 4, 0.001, 5e-3)


@pytest.fixture(scope="module")
def rows():
    return data.questions("train", 8)


def on_rows(model, rows, config=CONFIG, work=None):
    return train.train_lora(model, train.RowBatches(model.get_base_model(), rows, config), config, work)


def on_scenes(model, config, work=None):
    return train.train_lora(model, curriculum.chat_batches("lora", config, model.processor.tokenizer), config, work)


def logits(model, rows):
    return evaluate.answer_logits(model, rows)[0]


@pytest.mark.parametrize("make", [tiny.house, tiny.llava])
def test_adapters_begin_as_nothing_and_learn_alone(make, rows):
    base = make()
    model = train.add_lora(base, 4)
    assert torch.allclose(logits(model.get_base_model(), rows), logits(base, rows), atol=1e-5)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model = on_rows(model, rows)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), make().parameters(), strict=True)), "a copy is adapted"
    merged = train.merge_lora(model)
    assert type(merged) is type(base) and not any("lora" in n for n, _ in merged.named_parameters())
    assert torch.allclose(logits(merged, rows), logits(model.get_base_model(), rows), atol=1e-4)
    assert not torch.allclose(logits(merged, rows), logits(base, rows), atol=1e-4)
    assert any("lora_" in n for n, _ in model.named_parameters()), "merging leaves the adapted model as it was"


def test_the_loss_of_its_rows_falls(rows):
    def loss(m):
        found, wanted = evaluate.answer_logits(m, rows)
        return torch.nn.functional.cross_entropy(found, wanted).item()

    base = tiny.house()
    taught = train.merge_lora(on_rows(train.add_lora(base, 4), rows, train.TrainConfig(20, 4, 0.001, 1e-2)))
    assert loss(taught) < loss(base) - 0.3


def test_parts_can_be_chosen_and_answers_are_logged_by_family(house_vlm, tmp_path):
    model = train.add_lora(models.load(house_vlm), 2, parts=("language",))
    assert not any("vision" in n for n, p in model.named_parameters() if p.requires_grad)
    on_scenes(model, train.TrainConfig(2, 4, 0.001, 1e-3), tmp_path)
    assert "reading" in train.read_log(tmp_path)


def test_scenes_reach_every_adapter(house_vlm):
    model = on_scenes(train.add_lora(models.load(house_vlm), 2), train.TrainConfig(2, 4, 0.001, 1e-3))
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_a_training_is_taken_up_where_it_was_left(rows, tmp_path):
    whole = on_rows(train.add_lora(tiny.house(), 2), rows)
    on_rows(train.add_lora(tiny.house(), 2), rows, work=tmp_path)
    again = on_rows(train.add_lora(tiny.house(), 2), rows, work=tmp_path)  # its last checkpoint is the end
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_merging_fills_zeros_and_adapters_beside_keep_them(rows):
    sparse = tiny.house()
    with torch.no_grad():
        for _, layer in models.linears(sparse):
            layer.weight.copy_(prune.magnitude_prune(layer.weight, 0.5))
    model = on_rows(train.add_lora(sparse, 4), rows)

    def zeros(m):
        return {n.replace(".base_layer", "").replace("base_model.model.", ""): (p == 0).float().mean().item()
                for n, p in m.named_parameters() if p.ndim == 2 and "lora_" not in n}  # fmt: skip

    name = next(n for n, _ in models.linears(sparse)) + ".weight"
    assert zeros(model)[name] == zeros(sparse)[name] >= 0.49
    assert zeros(train.merge_lora(model))[name] < 0.01


def test_four_bit_matrices_are_adapted_too(house_vlm, rows, tmp_path):
    house = models.load(house_vlm)
    quantize.write_nf4(house, quantize.can_nf4(house), tmp_path / "nf4")
    four = quantize.load_nf4(tmp_path / "nf4")
    for p in four.parameters():  # as it is loaded where the CPU has bf16
        p.data = p.data.bfloat16() if p.is_floating_point() else p.data
    before = logits(four, rows).float()  # an answer may turn its weights round, where nothing could be trained or merged
    model = train.add_lora(four, 4)
    step = train.TrainConfig(1, 4, 0.001, 0.0)  # the scenes' images are in floats
    on_scenes(model, step, tmp_path / "w")
    on_scenes(train.add_lora(four, 4), step, tmp_path / "w")  # nothing left to do, but to read what was written
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed, "the matrices are packed"
    model = on_rows(model, rows)
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
    found = logits(model.get_base_model(), rows)
    assert torch.isfinite(found).all() and not torch.allclose(found, before, atol=1e-3)
    first = models.parts(model.get_base_model())["vision"].encoder.layers[0].self_attn.k_proj
    assert first.lora_B["default"].weight.abs().sum() > 0, "a gradient came through all the layers above"
    merged = train.merge_lora(model)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}, "in floats: rounded again, most of it would be lost"
    moved = found.float() - before
    kept = logits(merged, rows) - before
    assert torch.cosine_similarity(kept.flatten(), moved.flatten(), dim=0) > 0.9 and 0.9 < kept.norm() / moved.norm() < 1.1
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    same = logits(train.merge_lora(train.add_lora(four, 4)), rows)
    assert (same - before).norm() < 0.2 * before.norm(), "nothing was added"


def test_bad_input_is_refused(rows):
    with pytest.raises(UserError, match="rank 0 in vision, connector, language; expected 1 or more"):
        train.add_lora(tiny.house(), 0)
    with pytest.raises(UserError, match="in wings; expected 1 or more, in vision"):
        train.add_lora(tiny.house(), 2, parts=("wings",))
    with pytest.raises(UserError, match="8 rows for batches of 16"):
        on_rows(train.add_lora(tiny.house(), 2), rows, train.TrainConfig(1, 16))
    broken = train.add_lora(tiny.house(), 2)
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_B" in n).fill_(float("inf"))
    with pytest.raises(ParityError, match="not finite; train with a lower rate"):
        train.merge_lora(broken)


@pytest.mark.parametrize("make", [tiny.house, tiny.llava])
def test_new_words_are_tokens_that_learn(make, tmp_path):
    base = make()
    grown, ids = train.add_tokens(base, {"pinkish": ["red", "blue"], "heartlike": ["star"]})
    tokenizer = grown.processor.tokenizer
    assert tokenizer.encode("a pinkish heartlike", add_special_tokens=False)[-2:] == ids
    assert tokenizer.decode(ids).split() == ["pinkish", "heartlike"]
    assert len(base.processor.tokenizer.encode(" pinkish", add_special_tokens=False)) > 1, "the old one stays as it is"
    table, old = grown.get_input_embeddings().weight, base.processor.tokenizer.encode(" red blue", add_special_tokens=False)
    assert torch.allclose(table[ids[0]], base.get_input_embeddings().weight[old].mean(0), atol=1e-6)
    rows = data.questions("train", 8)
    rows = rows.map(lambda r: {"answer": "pinkish", "question": "Is it heartlike?"})
    model = on_rows(train.add_lora(grown, 4, token_ids=ids), rows, train.TrainConfig(20, 4, 0.001, 1e-2))
    merged = train.merge_lora(model)
    merged.processor = grown.processor
    assert torch.allclose(logits(merged, rows), logits(model.get_base_model(), rows), atol=1e-4)
    assert not torch.equal(merged.get_input_embeddings().weight[ids], table[ids])
    known = [t for t in range(len(base.processor.tokenizer)) if t not in ids]
    assert torch.equal(merged.get_input_embeddings().weight[known], table[known]), "no other word moves"
    assert all(a.startswith("pinkish") for a in evaluate.answers(merged, rows["image"][:2], rows["question"][:2]))
    models.save(merged, merged.processor, tmp_path / "pink", dtype=torch.float32)
    again = models.load(tmp_path / "pink")
    assert torch.allclose(logits(again, rows), logits(merged, rows), atol=1e-5)


def test_words_that_cannot_be_added_are_refused(house_vlm):
    house = models.load(house_vlm)
    with pytest.raises(UserError, match="of 479; give those"):
        train.add_lora(house, 2, token_ids=[479])
    for words in ({"red": ["blue"]}, {"pink": []}, {}, {"pink": "red"}):
        with pytest.raises(UserError, match="give new words"):
            train.add_tokens(house, words)
