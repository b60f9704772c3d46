"""NF4 checkpoints: layers that the kernels cannot take stay in floats, and the model answers."""

import pytest
import torch
from torch import nn

import tiny
from mmrecipes import data, models, quantize


def test_a_head_of_odd_size_stays_in_floats_and_is_named(tmp_path):
    model = tiny.house()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    old = model.lm_head.weight
    model.lm_head = nn.Linear(old.shape[1], len(old), bias=False)
    assert len(old) % quantize.nf4.OUTPUTS, "an odd vocabulary"
    able = quantize.can_nf4(model)
    assert able and "lm_head" not in able
    with pytest.warns(UserWarning, match="1 layers stay in bf16, such as lm_head: no multiple of 64 inputs and 32 outputs"):
        quantize.write_nf4(model, able | {"lm_head"}, tmp_path / "nf4")
    four = quantize.load_nf4(tmp_path / "nf4")
    assert four.lm_head.weight.is_floating_point() and any(p.dtype == torch.uint8 for p in four.parameters())
    row = data.test_split(1)[0]
    assert isinstance(models.ask(four, row["image"], row["question"], 2), str)
