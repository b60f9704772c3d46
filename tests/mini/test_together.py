"""The steps of benchmarks/together.py: what one does to what another left, on the trained `mini-vlm`."""

import sys
from dataclasses import replace

import pytest
import torch

from mmrecipes import data, models
from mmrecipes.data.splits import block
from mmrecipes.quantize.groups import on_grid
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import together

SHORT = replace(together.CONFIG, steps=1, batch=2)


@pytest.fixture(scope="module")
def whole():
    return models.load("mini-vlm")


def test_packed_questions_with_fewer_visual_tokens_compute_what_each_computes_alone(whole):
    coarse = together.coarser(whole, together.FACTOR)
    batch = together.CoarseBatches(block("recovery/chat"), 1, 2, whole.processor.tokenizer)[0]
    seen = together.mini_model.VISUAL_TOKENS // together.FACTOR**2
    less = together.fewer(batch, coarse.config.image_token_id, seen)
    assert int((less.ids == coarse.config.image_token_id).sum()) == 2 * seen
    core = coarse.model
    with torch.inference_mode():
        visual = core.connector(core.vision_model(batch.images).last_hidden_state)
        out, _ = together.losses.packed_pass(core, visual, less)
        for question in (1, 7):
            own = (less.segments[0] == 0) | (less.segments[0] == question)
            alone = coarse(input_ids=less.ids[:1, own], pixel_values=batch.images[:1, None]).logits[0]
            torch.testing.assert_close(coarse.lm_head(out.last_hidden_state[0, own]), alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("steps", "bits"), [("Q-P", 4), ("Q-P-D", 2), ("P-Q-D", 2), ("L-T-P-Q", 4), ("T-P-Q-D", 4)])
def test_after_a_quantization_every_step_leaves_weights_that_can_be_stored(steps, bits, tmp_path):
    model = together.model_of(steps, bits, tmp_path, SHORT)
    linear = [layer.weight for _, layer in models.linears(model)]
    assert all(on_grid(weight, bits) for weight in linear)
    row = data.test_split(1)[0]
    assert models.ask(model, row["image"], row["question"])


def test_a_cut_after_rounding_is_off_the_levels_until_it_is_rounded_again(whole):
    rounded = together.model_of("Q", 4, ROOT, SHORT)
    narrow = together.cut_on_levels(rounded)
    off = [name for name, layer in models.linears(narrow) if not on_grid(layer.weight, 4)]
    assert off and all(name.endswith(("fc2", "down_proj")) for name in off)  # the matrices that lost columns
    assert all(on_grid(layer.weight, 4) for _, layer in models.linears(together.rounded(narrow, 4)))


def test_twice_the_steps(tmp_path):
    together.model_of("P-D2", 0, tmp_path, SHORT)
    assert len((tmp_path / "P-D2" / "log.jsonl").read_text().splitlines()) == 2 * SHORT.steps


def test_every_deployed_plan_is_one_of_the_grid():
    assert {plan for plan, _, _ in together.DEPLOYED.values()} <= set(together.PLANS)
    assert {f"{order}, {bits} bits" for order in together.ORDERS for bits in (4, 2)} <= set(together.PLANS)
