"""Fewer visual tokens: by hand == packaged == library, on the house model and on a LLaVA nothing was fitted to."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import tiny
from mmrecipes import data, evaluate, models, quantize
from mmrecipes.data import scenes
from mmrecipes.errors import ParityError, UserError
from mmrecipes.prune import token_dropping, token_merging
from tests import families

QUESTION = "What colour is the star?"
PICTURE = scenes.render(scenes.make_scene(3), 128)


def llava(layers: int = 3, vision_layers: int = 2, feature_layer: int = -1):
    """The tiny LLaVA of a few layers."""
    one = tiny.llava()
    config = one.config
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = layers, vision_layers
    config.vision_feature_layer = feature_layer
    torch.manual_seed(0)
    model = type(one)(config).eval()
    model.processor = one.processor
    return model


MODELS = {"idefics3": lambda: tiny.house(layers=3), "llava": llava}


@pytest.fixture(scope="module")
def house(house_vlm):
    return models.load(house_vlm)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def unit_noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- nothing dropped: the library's own answers


def test_keeping_all_computes_what_the_model_does(model):
    inputs = models.chat(model, PICTURE, QUESTION)
    start = token_dropping.prefill(model, inputs, keep=1.0)
    with torch.inference_mode():
        wanted = model(**inputs).logits[:, -1]
        said = model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert torch.allclose(start.logits, wanted, atol=1e-5)
    assert token_dropping.decode(model, start, 6).tolist() == said[:, inputs["input_ids"].shape[1] :].tolist()


def test_keeping_all_answers_as_the_house_model_does(house):
    rows = data.test_split(70)
    base = evaluate.vqa(house, rows, progress=False)
    assert token_dropping.vqa(house, rows, 1.0).predictions == base.predictions


def test_generation_ends_and_is_filled_up(house):
    rows = data.test_split(20)
    for _, inputs in token_dropping.prompts(house, rows["image"][:], rows["question"][:]):
        ids = token_dropping.decode(house, token_dropping.prefill(house, inputs, keep=1.0), 12)
        end, pad = house.generation_config.eos_token_id, house.generation_config.pad_token_id
        for row in ids.tolist():
            assert row.count(end) == 1
            assert set(row[row.index(end) + 1 :]) <= {pad}


# ---- dropping


@pytest.mark.parametrize(
    ("how", "layer"), [(h, k) for h in token_dropping.HOW for k in range(h in token_dropping.BY_ATTENTION, 3)]
)
def test_dropping_is_hiding(model, how, layer):
    """Dropped tokens are gone: the same as a mask over them, in the layers after the drop, with all positions as they were."""
    inputs = models.chat(model, PICTURE, QUESTION)
    start = token_dropping.prefill(model, inputs, keep=0.25, layer=layer, how=how)
    language, length = models.parts(model)["language"], inputs["input_ids"].shape[1]
    hidden = torch.ones(length, dtype=torch.bool)
    hidden[start.kept[0]] = False
    causal = torch.ones(length, length).tril().bool()
    with torch.inference_mode():
        x, visual = token_dropping.embed(model, inputs)
        rope = language.rotary_emb(x, position_ids=torch.arange(length)[None])
        for i, block in enumerate(language.layers):
            mask = causal & ~(hidden & (i >= layer))
            x = block(x, attention_mask=mask[None, None], position_embeddings=rope)
        wanted = model.lm_head(language.norm(x[:, -1]))
    assert torch.allclose(start.logits, wanted, atol=1e-4)
    assert not (hidden & ~visual[0]).any(), "a text token was dropped"
    lengths = [each.keys.shape[2] for each in start.cache.layers]
    assert lengths == [length] * layer + [length - int(hidden.sum())] * (3 - layer)
    assert int(hidden.sum()) == int(visual.sum()) - round(0.25 * int(visual.sum()))


def test_a_decoded_token_sees_what_was_kept_at_its_own_position(model):
    inputs = models.chat(model, PICTURE, QUESTION)
    short = token_dropping.prefill(model, inputs, keep=0.5, layer=1, how="uniform")
    first = short.logits.argmax(-1)
    both = token_dropping.decode(model, short, 2)
    longer = dict(inputs) | {
        k: torch.cat([inputs[k], v[:, None]], 1) for k, v in (("input_ids", first), ("attention_mask", torch.ones_like(first)))
    }
    again = token_dropping.prefill(model, longer, keep=0.5, layer=1, how="uniform")
    assert again.logits.argmax(-1).tolist() == both[:, 1].tolist()


def test_attention_is_the_librarys(model):
    inputs, ids = models.chat(model, PICTURE, QUESTION), None
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        seen = model(**inputs, output_attentions=True).attentions
    for layer in (1, 2):
        ids = inputs["input_ids"][0] == model.config.image_token_id
        after = int(ids.nonzero().max()) + 1
        for how, given in (("attention", seen[layer - 1][0, :, -1:]), ("question", seen[layer - 1][0, :, after:])):
            score = given.mean(0).amax(0)[ids]
            n = round(0.5 * int(ids.sum()))
            best = set((ids.nonzero()[:, 0][score.topk(n).indices]).tolist())
            kept = set(token_dropping.prefill(model, inputs, keep=0.5, layer=layer, how=how).kept[0].tolist())
            assert best == kept & set(ids.nonzero()[:, 0].tolist())


def test_each_prompt_of_a_batch_keeps_its_own(house):
    rows = data.test_split(40)
    rows = rows.select([i for i, q in enumerate(rows["question"]) if q.startswith("How many")])
    for index, inputs in token_dropping.prompts(house, rows["image"][:], rows["question"][:], batch_size=4):
        together = token_dropping.prefill(house, inputs, keep=0.3, how="question")
        for row, i in enumerate(index):
            alone = token_dropping.prefill(
                house, models.chat(house, rows[i]["image"], rows[i]["question"]), keep=0.3, how="question"
            )
            assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-3)
            assert alone.kept[0].tolist() == together.kept[row].tolist()


def test_uniform_is_even():
    assert token_dropping.evenly(2, 8).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert token_dropping.evenly(8, 8).sum() == 8
    for count in (16, 64, 320):
        for n in (1, 5, count // 3, count):
            assert token_dropping.evenly(n, count).sum() == n


def test_half_the_tokens_are_enough_for_the_house_model(house):
    rows = data.test_split(140)
    base = token_dropping.vqa(house, rows, 1.0)
    half = token_dropping.vqa(house, rows, 0.5, layer=2, how="question")
    assert evaluate.paired(base.right, half.right).points >= -2.5
    aware, blind = (token_dropping.vqa(house, rows, 0.25, layer=0, how=how) for how in ("words", "random"))
    assert evaluate.paired(blind.right, aware.right).points > 10


def test_a_budget_can_depend_on_the_question(house):
    rows = data.test_split(70)
    counting = [i for i, f in enumerate(rows["family"]) if f == "count"]
    options = {"layer": 0, "how": "words"}
    base, all_of_it = evaluate.vqa(house, rows, progress=False), token_dropping.vqa(house, rows, 0.25, **options)
    mixed = token_dropping.vqa(house, rows, lambda q: 1.0 if q.startswith("How many") else 0.25, **options)
    for i in range(len(rows)):
        assert mixed.predictions[i] == (base if i in counting else all_of_it).predictions[i]


# ---- merging


def test_match_joins_the_most_alike():
    x = torch.tensor([[[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 1], [-1, 0], [0, -1]]])
    # even: 0, 2, 4; odd: 1, 3, 5. Nearest: 0-1, 2-3, 4-5 or 4-3; the two best pairs are 0-1 and 2-3
    place = token_merging.match(x, 2)
    assert place.tolist() == [[0, 0, 1, 1, 2, 3]]
    merged, size = token_merging.combine(x, torch.ones(1, 6), place)
    assert torch.allclose(merged[0, 0], torch.tensor([0.95, 0.05]))
    assert size.tolist() == [[2, 2, 1, 1]]


@pytest.mark.parametrize("fixed", [0, 1])
def test_merging_keeps_the_sum_and_leaves_the_class_token_alone(fixed):
    x, size = unit_noise(3, 33, 8), 1 + unit_noise(3, 33).abs()
    place = token_merging.match(x, 10, fixed)
    merged, total = token_merging.combine(x, size, place)
    assert merged.shape == (3, 23, 8)
    assert torch.allclose((merged * total[..., None]).sum(1), (x * size[..., None]).sum(1), atol=1e-4)
    assert torch.allclose(total.sum(1), size.sum(1))
    if fixed:
        assert torch.allclose(merged[:, 0], x[:, 0])
    assert token_merging.combine(x, size, token_merging.match(x, 99, fixed))[0].shape[1] == 33 - (33 - fixed) // 2


def test_copies_merge_without_loss():
    """Two equal tokens are one that counts twice: what comes out is the same. Without the log of the size it is not."""
    layers = models.parts(tiny.house(layers=2))["vision"].encoder.layers
    single = unit_noise(2, 16, 128)
    x, size = single.repeat_interleave(2, 1), torch.ones(2, 32)
    with torch.inference_mode():
        wanted = layers[1](layers[0](x, None), None)[:, ::2]
        once, size, place = token_merging.merged_layer(layers[0], x, size, 16)
        twice = token_merging.merged_layer(layers[1], once, size, 0)[0]
        assert torch.allclose(twice.gather(1, place[:, ::2, None].expand(-1, -1, 128)), wanted, atol=1e-4)
        some = token_merging.merged_layer(layers[0], x[:, 1:], torch.ones(2, 31), 15)  # one token is single, the others double
        even = token_merging.merged_layer(layers[1], some[0], torch.ones_like(some[1]), 0)[0]
        right = token_merging.merged_layer(layers[1], some[0], some[1], 0)[0]
        whole = layers[1](layers[0](x[:, 1:], None), None)
    back = [t.gather(1, some[2][..., None].expand(-1, -1, 128)) for t in (right, even)]
    assert torch.allclose(back[0], whole, atol=1e-4)
    assert not torch.allclose(back[1], whole, atol=1e-3)


TOWERS = (lambda: tiny.house(layers=2), llava, lambda: llava(feature_layer=-2), lambda: llava(feature_layer=1))


@pytest.mark.parametrize("make", TOWERS)
def test_merging_nothing_is_the_librarys_tower(make):
    model = make()
    inputs = models.chat(model, PICTURE, QUESTION)
    with torch.inference_mode():
        assert torch.allclose(token_dropping.features(model, inputs, 1e-9), token_dropping.features(model, inputs), atol=1e-4)


def test_merged_patches_become_copies(model):
    inputs = models.chat(model, PICTURE, QUESTION)
    with torch.inference_mode():
        whole, merged = token_dropping.features(model, inputs), token_dropping.features(model, inputs, 0.5)
    assert merged.shape == whole.shape
    kinds = len(torch.unique(merged.round(decimals=4), dim=0))
    assert kinds <= round(0.5 * len(whole)) + 1 < len(torch.unique(whole.round(decimals=4), dim=0))


def test_some_merging_keeps_the_house_models_answers(house):
    rows = data.test_split(70)
    base, merged = token_dropping.vqa(house, rows, 1.0), token_dropping.vqa(house, rows, 1.0, merge=0.25)
    assert evaluate.paired(base.right, merged.right).points > -4


# ---- a larger pixel shuffle


def test_a_larger_shuffle_starts_as_a_mean(tmp_path):
    model = tiny.house(layers=1)
    small = token_merging.coarser(model)
    inputs, fewer = models.chat(model, PICTURE, QUESTION), models.chat(small, PICTURE, QUESTION)
    with torch.inference_mode():
        before, after = token_dropping.features(model, inputs), token_dropping.features(small, fewer)
    blocks = before.view(4, 2, 4, 2, -1).mean((1, 3)).flatten(0, 1)
    assert torch.allclose(after, blocks, atol=1e-5)
    assert (fewer["input_ids"] == small.config.image_token_id).sum() == 16
    assert (models.chat(model, PICTURE, QUESTION)["input_ids"] == model.config.image_token_id).sum() == 64, "the original changed"
    back = models.load(models.save(small, small.processor, tmp_path / "small", dtype=torch.float32))
    with torch.inference_mode():
        assert torch.allclose(token_dropping.features(back, models.chat(back, PICTURE, QUESTION)), after, atol=1e-5)
    twice = token_merging.coarser(token_merging.coarser(model))
    at_once = token_merging.coarser(model, 4)
    with torch.inference_mode():
        found = [token_dropping.features(m, models.chat(m, PICTURE, QUESTION)) for m in (twice, at_once)]
    assert torch.allclose(*found, atol=1e-5)


# ---- with int8, and what is refused


def test_dropping_goes_with_int8(house):
    small = quantize.simulate(house, 8)
    rows = data.test_split(30)
    assert token_dropping.vqa(small, rows, 0.5, how="question").overall.value > 0.8


def test_broken_weights_are_no_answers(house):
    broken = models.clone(house)
    broken.model.text_model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ParityError, match="not finite"):
        token_dropping.vqa(broken, data.test_split(5), 0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"how": "magic"}, "magic"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"layer": 3}, "layer=3"),
        ({"layer": 0, "how": "attention"}, "layer=0"),
        ({"merge": 1.0}, "merge=1.0"),
    ],
)
def test_bad_options_are_named(options, says):
    model = tiny.house(layers=3)
    with pytest.raises(UserError, match=says):
        token_dropping.prefill(model, models.chat(model, PICTURE, QUESTION), **options)


def test_what_does_not_fit_is_refused(house):
    with pytest.raises(UserError, match="Llama-like"):
        token_dropping.read(families.FAMILIES["blip2"](), torch.zeros(1, 4, 64), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="pixel shuffle"):
        token_merging.coarser(tiny.llava())
    inputs = models.chat(house, PICTURE, QUESTION)
    padded = dict(inputs) | {"attention_mask": inputs["attention_mask"].clone()}
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(UserError, match="padded"):
        token_dropping.prefill(house, padded)
    blind = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(UserError, match="visual tokens a prompt"):
        token_dropping.prefill(house, blind)
    with pytest.raises(UserError, match="fill their tiles"):
        holes = inputs["pixel_attention_mask"].clone()
        holes[..., :5] = 0
        token_dropping.features(house, dict(inputs) | {"pixel_attention_mask": holes}, merge=0.5)


def test_pictures_of_several_sizes_can_be_asked_at_once(house):
    pictures = [PICTURE, Image.new("RGB", (64, 128), "teal"), PICTURE]
    found = token_dropping.answers(house, pictures, [QUESTION] * 3, keep=0.5)
    assert found[0] == found[2]
    assert all(found)
