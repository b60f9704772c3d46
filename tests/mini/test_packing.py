"""Steps that make `mini-resampler` faster: each alone, and all, give what it gave; packed images do not see one another."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmrecipes import data, evaluate, models
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.evaluate.statistics import agreement
from mmrecipes.mini import fast_resampler
from mmrecipes.mini import modeling_mini_resampler as modeling
from tests.mini.test_resampler import inputs_of

STEPS = fast_resampler.STEPS
PATCH = 8  # px
SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))  # rows and columns of patches
EACH = [pytest.param((step,), id=step) for step in STEPS] + [pytest.param(STEPS, id="all"), pytest.param((), id="none")]
ANSWER = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Tiny and random, with attention that keeps its weights; two heads everywhere, and fewer keys than queries' heads."""
    vision = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0, "eos_token_id": 1}
    config = modeling.MiniResamplerConfig(
        vision_config=vision | {"image_size": 64, "patch_size": PATCH}, text_config=text, queries_per_side=2, image_token_id=3
    )
    torch.manual_seed(0)
    made = modeling.MiniResamplerForConditionalGeneration(config).eval()
    for p in made.parameters():  # biases and norms that do something
        p.data += 0.05 * torch.randn(p.shape)
    made.set_attn_implementation("eager")
    return made


@pytest.fixture(scope="module")
def house() -> nn.Module:
    return models.load("mini-resampler")


def batch(*rows: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Prompts padded on the left, with images of these grids in each; a row without as many gets images of zeros."""
    torch.manual_seed(1)
    most, grids = max(map(len, rows)), [grid for row in rows for grid in row]
    tall, wide = (PATCH * max(sides) + 3 for sides in zip(*grids, strict=True))  # 3 px less than a patch, which are none
    pixels, seen = torch.zeros(len(rows), most, 3, tall, wide), torch.zeros(len(rows), most, tall, wide, dtype=torch.long)
    ids = torch.zeros(len(rows), 4 * most + 5, dtype=torch.long)
    for i, row in enumerate(rows):
        for k, (down, across) in enumerate(row):
            pixels[i, k, :, : PATCH * down, : PATCH * across] = torch.rand(3, PATCH * down, PATCH * across) * 2 - 1
            seen[i, k, : PATCH * down, : PATCH * across] = 1
        ids[i, -4 * len(row) - 5 :] = torch.tensor([5, 6, *[3] * (4 * len(row)), 7, 8 + i, 9])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels, "pixel_attention_mask": seen}


def visual(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"]).pooler_output


@pytest.mark.parametrize("steps", EACH)
@torch.no_grad()
def test_each_step_alone_gives_what_the_model_gives(model, steps):
    inputs = batch([(2, 3)], [(9, 1)], [(4, 4)])
    fast = fast_resampler.faster(model, steps)
    real, kept = inputs["attention_mask"].bool(), 1 if "last_logits" in steps else 0
    wanted, found = model(**inputs, logits_to_keep=kept).logits, fast(**inputs).logits
    torch.testing.assert_close(visual(fast, inputs), visual(model, inputs), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[real[:, -kept:]], wanted[real[:, -kept:]], atol=2e-5, rtol=1e-4)
    assert fast.generate(**inputs, **ANSWER).equal(model.generate(**inputs, **ANSWER))


@torch.no_grad()
def test_the_original_stays_as_it_was_and_shares_its_weights(model):
    inputs = batch([(2, 3), (3, 3)])
    before, kept = model(**inputs).logits, dict(model.named_parameters())
    for steps in (STEPS, ("bf16",), (*STEPS, "int8")):
        fast = fast_resampler.faster(model, steps)
        assert not fast.training
        assert {p.dtype for p in fast.parameters()} == {torch.float32 if steps == STEPS else torch.bfloat16}
    assert model(**inputs).logits.equal(before)
    assert model.config._attn_implementation == "eager"
    assert all(p is kept[name] for name, p in model.named_parameters())
    fast = dict(fast_resampler.faster(model).named_parameters())
    own = {name for name in fast if fast[name] is not kept.get(name)}
    stored = {p.untyped_storage().data_ptr() for p in kept.values()}
    copied = {name for name in own if fast[name].untyped_storage().data_ptr() not in stored}
    assert copied == {n for n in fast if ".qkv." in n}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(grids=st.lists(SIDES, min_size=1, max_size=5))
@torch.no_grad()
def test_packed_images_become_the_tokens_they_become_alone(model, grids):
    """No image sees another, whatever their sizes: neither in the vision encoder nor in the resampler."""
    fast, inputs = fast_resampler.faster(model), batch(grids)
    together = visual(fast, inputs).view(len(grids), 4, -1)
    for k, (down, across) in enumerate(grids):
        alone = inputs["pixel_values"][:, k : k + 1, :, : PATCH * down, : PATCH * across]
        for one in (model, fast):
            torch.testing.assert_close(together[k], one.get_image_features(alone).pooler_output, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_sequence_is_as_long_as_its_patches(model):
    inputs, fast = batch([(2, 3), (9, 9), (1, 1)]), fast_resampler.faster(model, ("packed",))
    features = fast.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"]).last_hidden_state
    assert features.shape == (1, 6 + 81 + 1, 48)


@pytest.mark.parametrize("steps", [STEPS, (*STEPS, "bf16"), (*STEPS, "int8")], ids=["fp32", "bf16", "int8"])
@torch.no_grad()
def test_two_images_one_and_none(model, steps):
    fast, inputs = fast_resampler.faster(model, steps), batch([(2, 3), (5, 4)], [(3, 3)], [])
    atol = 2e-5 if steps == STEPS else 0.1
    torch.testing.assert_close(fast(**inputs).logits.float(), model(**inputs).logits[:, -1:], atol=atol, rtol=1e-4)
    text = {"input_ids": inputs["input_ids"][2:, -5:]}
    torch.testing.assert_close(fast(**text).logits.float(), model(**text).logits[:, -1:], atol=atol, rtol=1e-4)


@torch.no_grad()
def test_int8_does_not_depend_on_the_rest_of_the_batch(model):
    """Each token has a scale of its own: an image beside others becomes the tokens that it becomes alone."""
    fast, inputs = fast_resampler.faster(model, (*STEPS, "int8")), batch([(2, 3), (9, 9)])
    alone = fast.get_image_features(inputs["pixel_values"][:, :1, :, : 2 * PATCH, : 3 * PATCH]).pooler_output
    torch.testing.assert_close(visual(fast, inputs)[:4], alone, atol=0.05, rtol=0.05)
    wanted = visual(model, inputs)
    assert 0 < (visual(fast, inputs) - wanted).norm() / wanted.norm() < 0.05


@torch.no_grad()
def test_int8_layers_are_a_quarter_of_the_bytes_and_close():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(2, 700, 64) * torch.logspace(-2, 2, 700)[:, None]  # tokens of unlike sizes
    found, wanted = fast_resampler.Int8Linear(layer)(x.bfloat16()).float(), layer(x)
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)  # of each token
    assert found.shape == wanted.shape
    assert error.median() < 0.01 and error.max() < 0.1


@torch.no_grad()
def test_logits_that_are_asked_for_are_kept(model):
    fast, inputs = fast_resampler.faster(model, ("last_logits",)), batch([(2, 3)])
    length = inputs["input_ids"].shape[1]
    assert fast(**inputs).logits.shape[1] == 1
    assert fast(**inputs, logits_to_keep=3).logits.shape[1] == 3
    assert fast(**inputs, logits_to_keep=0).logits.shape[1] == length
    assert fast(**inputs, labels=inputs["input_ids"]).logits.shape[1] == length
    padded = {k: torch.nn.functional.pad(v, (0, 2)) for k, v in inputs.items() if "pixel" not in k}  # on the right
    assert fast(**inputs | padded).logits.shape[1] == length + 2


def test_what_misfits_is_told(model):
    inputs = batch([(2, 3)])
    inputs["input_ids"][0, -4] = 7
    with pytest.raises(ValueError, match="do not match, tokens: 3, features: 4"):
        fast_resampler.faster(model)(**inputs)
    with pytest.raises(UserError, match="no step 'flash'; expected sdpa, constant_query"):
        fast_resampler.faster(model, ("flash",))
    with pytest.raises(UserError, match="has no resampler"):
        fast_resampler.faster(models.load("mini-vlm"))


def test_answers_are_those_of_the_original(house):
    """Through the processor, `generate` and the evaluation, several sizes in a batch."""
    rows = data.test_split(42)
    images = [scenes.render(scenes.make_scene(i), 200).resize((96 + 8 * (i % 9), 160)) for i in range(3)]
    wanted = evaluate.vqa(house, rows, progress=False)
    for steps in (STEPS, (*STEPS, "bf16"), (*STEPS, "int8")):
        fast = fast_resampler.faster(house, steps)
        found = evaluate.vqa(fast, rows, progress=False)
        same = agreement(found.predictions, wanted.predictions)
        assert same.value == 1 if steps == STEPS else same.value > 0.9
        inputs = inputs_of(house, images[:1], images[1:], [])
        error = (fast(**inputs).logits.float() - house(**inputs).logits[:, -1:]).norm() / house(**inputs).logits[:, -1:].norm()
        assert error < (1e-4 if steps == STEPS else 0.1)
