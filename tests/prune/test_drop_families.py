"""Visual tokens are dropped in families with positions, masks or image features of their own, as if they were hidden."""

import contextlib

import pytest
import torch
from PIL import Image

from mmrecipes import evaluate, models
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.prune import token_dropping
from tests import families

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "internvl", "mistral3")
PICTURE = scenes.render(scenes.make_scene(3), 64)
QUESTION = "?"  # short, so that a sliding window reaches the image


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return families.FAMILIES[request.param]()


def longer(model, inputs, ids):
    """The prompt followed by generated tokens `ids` (1, N), which are text; of PaliGemma the suffix, which looks back."""
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kind = int(model.config.model_type == "paligemma")
    kinds = {k: torch.full_like(ids, kind) for k in ("token_type_ids", "mm_token_type_ids") if k in inputs}
    return dict(inputs) | {k: torch.cat([inputs[k], v], 1) for k, v in (more | kinds).items()}


@torch.inference_mode()
def hiding(model, inputs, hidden, layer):
    """Logits (V) of the next token by one run of the whole model, where from `layer` on nobody sees the positions `hidden`."""

    def hide(_, args, kwargs):
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].index_fill(-1, hidden, torch.finfo(torch.float32).min)}

    model.set_attn_implementation("eager")  # whose masks are always there
    with contextlib.ExitStack() as hooks:
        for block in models.layers(model)["language"][layer:]:
            hooks.enter_context(block.register_forward_pre_hook(hide, with_kwargs=True))
        logits = model(**inputs, use_cache=False).logits[0, -1]
    model.set_attn_implementation("sdpa")
    return logits


@pytest.mark.parametrize(("how", "layer"), [("uniform", 0), ("question", 1), ("words", 1)])
def test_dropping_is_hiding_also_for_the_tokens_that_follow(model, how, layer):
    inputs = models.chat(model, PICTURE, QUESTION)
    start = token_dropping.prefill(model, inputs, 0.25, layer, how)
    kept, length = start.kept[0].tolist(), inputs["input_ids"].shape[1]
    hidden = torch.tensor([i for i in range(length) if i not in kept])
    visual = inputs["input_ids"][0] == model.config.image_token_id
    assert visual[hidden].all()
    assert len(hidden) == visual.sum() - round(0.25 * int(visual.sum()))
    torch.testing.assert_close(start.logits[0], hiding(model, inputs, hidden, layer), rtol=1e-4, atol=1e-5)
    ids = token_dropping.decode(model, start, 5)
    for n in range(1, ids.shape[1]):
        assert hiding(model, longer(model, inputs, ids[:, :n]), hidden, layer).argmax() == ids[0, n]


def test_keeping_all_answers_as_the_model_does(model):
    images, questions = [PICTURE, Image.new("RGB", (96, 48), "teal"), PICTURE], [QUESTION, "How many are there?", QUESTION]
    found = token_dropping.answers(model, images, questions, 1.0, layer=1)
    assert found == evaluate.answers(model, images, questions, 1, progress=False)


@pytest.mark.parametrize("name", ["qwen3_5", "minicpmv4_6"])
def test_recurrent_states_are_the_reason_of_a_refusal(name):
    model = families.FAMILIES[name]()
    with pytest.raises(UserError, match="keeps recurrent states, in which tokens cannot be told apart; give a model"):
        token_dropping.prefill(model, models.chat(model, PICTURE, QUESTION))


def test_an_encoder_decoder_and_what_reads_more_than_embeddings_are_refused():
    with pytest.raises(UserError, match="is an encoder-decoder, and only decoders are supported; give another model"):
        token_dropping.prefill(families.FAMILIES["florence2"](), {})
    for name in ("qwen3_vl", "gemma3"):
        model = families.FAMILIES[name]()
        with pytest.raises(UserError, match="makes positions or masks from token ids; use `prefill`, without merging"):
            token_dropping.prefill(model, models.chat(model, PICTURE, QUESTION), merge=0.5)
