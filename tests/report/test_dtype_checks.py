"""What doctor says of dtypes without running a model is what happens when it runs, on every family; and the cures cure."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, Siglip2VisionConfig

import tiny
from mmrecipes import models
from mmrecipes.data import scenes
from mmrecipes.models import loading, modules
from mmrecipes.quantize import nf4
from mmrecipes.report import config_only, doctor, dtype_checks
from tests import families

READ, BARE = "dynamic int8, 4-bit layers", "int8, 4-bit layers"
FINDINGS = {  # (technique, where), and the layers to skip
    "idefics3": ([], []),
    "smolvlm": ([], []),
    "idefics2": ([(BARE, "model.connector.perceiver_resampler.latents")], []),
    "llava": ([], []),
    "llava_next": ([], []),
    "qwen2_5_vl": ([], []),
    "qwen3_vl": ([], []),
    "internvl": ([(BARE, "model.vision_tower.embeddings.position_embeddings")], ["lm_head"]),
    "gemma3": ([(BARE, "model.multi_modal_projector.mm_input_projection_weight")], ["lm_head"]),
    "minicpmv4_6": ([], []),
    "siglip2": (
        [
            (READ, "vision_model.embeddings.patch_embedding"),
            (READ, "vision_model.head.attention.out_proj"),
            (BARE, "vision_model.head.attention.in_proj_weight"),
        ],
        ["vision_model.embeddings.patch_embedding", "vision_model.head.attention.out_proj"],
    ),
}
CHATS = [name for name in FINDINGS if name not in families.DUALS]


class Attends(nn.Module):
    """A connector whose output attends to itself through an `nn.MultiheadAttention`."""

    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner, self.attn = inner, nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, *args, **kwargs):
        tokens = self.inner(*args, **kwargs)
        return tokens + self.attn(tokens, tokens, tokens)[0]


def pairs(model):
    return [(f.technique, f.where) for f in dtype_checks.dtype_findings(model)]


def ask(model, size=64):
    inputs = models.chat(model, scenes.render(scenes.make_scene(1), size), "How many?")
    return {k: v for k, v in inputs.items() if k != "labels"}  # PaliGemma's processor adds them


def cast_part_(model, part, dtype):
    """All that a part holds itself, in another dtype."""
    for module, owner in modules.owners(model).items():
        if owner == part:
            for held in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if held.is_floating_point():
                    held.data = held.data.to(dtype)
    return model


@pytest.fixture
def attends():
    torch.manual_seed(0)
    model = tiny.house().requires_grad_(False)
    model.model.connector = Attends(model.model.connector, 128).eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("name", FINDINGS)
def test_findings_and_skip_list_of_each_family(name):
    findings, skip = FINDINGS[name]
    for model in (families.FAMILIES[name](), loading.skeleton(families.family_dir(name))):
        assert pairs(model) == findings
        assert dtype_checks.skip_list(model) == skip


@pytest.mark.parametrize("name", CHATS)
def test_all_layers_but_those_of_the_list_run_in_four_bits(name):
    model = families.FAMILIES[name]()
    found = dtype_checks.prove(model, ask(model), dtype_checks.skip_list(model))
    assert found["layers"] >= 20 and found["finite"]
    assert 0.01 < found["error"] < 0.8  # of random weights, which round worse than trained ones


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("odd", ["vision", "connector", "language", None])
def test_casts_are_where_dtypes_differ_and_nowhere_else(name, odd):
    source = families.FAMILIES[name]().requires_grad_(False)
    inputs = ask(source)
    model = modules.clone(source).bfloat16()
    if odd:
        cast_part_(model, odd, torch.float32)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    wanted = {"vision": [0], "connector": [0, 1], "language": [1] if tied else [1, 2], None: []}[odd]
    steps = [f"{a} -> {b}" for a, b in dtype_checks.NEXT]
    assert [w for t, w in pairs(model) if "->" in w] == [steps[i] for i in wanted]
    hooks = dtype_checks.cast_at_boundaries_(model)
    assert list(hooks) == [steps[i] for i in wanted]
    if name == "smolvlm" and odd in ("vision", "language"):  # it casts to the dtype of its first weight, behind the hook
        with pytest.raises(RuntimeError, match="masked_scatter"):
            model(**inputs)
        return
    logits, reference = model(**inputs).logits.float(), source(**inputs).logits
    assert (logits - reference).norm() < 0.1 * reference.norm()


def test_a_boundary_without_its_cast_is_an_error():
    model = cast_part_(families.FAMILIES["llava"]().bfloat16(), "vision", torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(**ask(model))
    hooks = dtype_checks.cast_at_boundaries_(model)
    assert model(**ask(model)).logits.isfinite().all()
    for handle in hooks["vision -> connector"]:
        handle.remove()
    with pytest.raises(RuntimeError, match="same dtype"):
        model(**ask(model))


def test_a_layer_of_the_list_breaks_and_the_cure_heals_it(attends):
    inputs, layer = ask(attends, 128), "model.connector.attn.out_proj"
    assert (READ, layer) in pairs(attends)
    skip = dtype_checks.skip_list(attends)
    assert skip == [layer, "lm_head"]
    assert dtype_checks.prove(attends, inputs, skip)["finite"]
    with pytest.raises(RuntimeError, match="self and mat2 must have the same dtype, but got Float and Byte"):
        dtype_checks.prove(attends, inputs, ["lm_head"])
    broken = nf4.to_nf4_(modules.clone(attends), [layer])
    states = {f.where: f.what for f in dtype_checks.dtype_findings(broken) if f.technique == READ}
    assert "ends in an error" in states[layer]
    assert ("packed weights", f"{layer}.weight") in pairs(broken)
    assert dtype_checks.call_the_layer_(broken) == ["model.connector.attn"]  # one that is packed already is healed, too
    wanted = attends(**inputs).logits
    assert (broken(**inputs).logits - wanted).norm() < 0.2 * wanted.norm()
    cured = modules.clone(attends)
    dtype_checks.call_the_layer_(cured)
    torch.testing.assert_close(cured(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert dtype_checks.skip_list(cured) == ["lm_head"]
    assert pairs(cured) == []
    found = dtype_checks.prove(cured, inputs, dtype_checks.skip_list(cured))
    assert found["finite"] and found["layers"] == dtype_checks.prove(attends, inputs, skip)["layers"] + 4


def test_a_subclass_that_calls_its_layer_is_free():
    class Calls(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return self.out_proj(F.scaled_dot_product_attention(query, key, value)), None

    class Inherits(nn.MultiheadAttention):
        pass

    layers = dtype_checks.read_not_called(nn.ModuleDict({"calls": Calls(8, 2), "inherits": Inherits(8, 2)}))
    assert layers == {"inherits.out_proj": "Inherits reads"}


def test_a_layer_whose_dtype_is_asked_for_is_listed():
    vision = Siglip2VisionConfig(**tiny.VISION | {"num_patches": 16}, vision_use_head=False)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=tiny.text_config(model_type="llama")))
    (found,) = dtype_checks.dtype_findings(model)
    assert found.where == "model.vision_tower.embeddings.patch_embedding"
    assert "reads the dtype of" in found.what and "norm" in found.cure


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 12, "vdim": 20}, {"bias": False}], ids=["same", "other widths", "no bias"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_the_called_attention_equals_the_library_s(batch_first, widths, need_weights):
    torch.manual_seed(0)
    source = nn.MultiheadAttention(16, 4, batch_first=batch_first, **widths).eval()
    holder = nn.ModuleList([source])
    if "bias" not in widths:
        nn.init.normal_(source.in_proj_bias)
    assert dtype_checks.call_the_layer_(holder) == ["0"]
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 7, widths.get("kdim", 16)), torch.randn(2, 7, widths.get("vdim", 16))
    padding = torch.arange(7) > torch.tensor([[6], [3]])
    masks = [{}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(5, 7)}]
    masks += [{"attn_mask": torch.rand(8, 5, 7) > 0.9, "key_padding_mask": padding}, {"attn_mask": torch.ones(5, 7).triu(3) > 0}]
    for options in (*masks, {"average_attn_weights": False}):
        options = options | {"need_weights": need_weights}
        inputs = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
        torch.testing.assert_close(holder[0](*inputs, **options), source(*inputs, **options))
    torch.testing.assert_close(holder[0](q[0], k[0], v[0]), source(q[0], k[0], v[0]))  # without a batch


def test_extra_keys_stay_as_they_are():
    holder = nn.ModuleList([nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2, add_zero_attn=True)])
    assert dtype_checks.call_the_layer_(holder) == []


def test_an_encoder_layer_whose_attention_is_replaced_computes_the_same():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 16)
    wanted = layer(x)
    dtype_checks.call_the_layer_(layer)
    torch.testing.assert_close(layer(x), wanted)


def test_half_precision_and_integer_pixels_are_noted():
    model = tiny.llava()
    assert pairs(model) == []
    assert pairs(model.half()) == [("fp16", "vision")]
    images = model.processor.image_processor
    images.do_rescale = images.do_normalize = False
    assert pairs(model.bfloat16()) == [("all", "pixel_values")]
    assert models.chat(model, scenes.render(scenes.make_scene(1)), "How many?")["pixel_values"].dtype == torch.uint8


def test_torchao_and_doctor(attends):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    small = modules.clone(attends)
    quantize_(small, Int8WeightOnlyConfig(), lambda m, name: name.endswith("fc1"))
    assert "packed weights" in [technique for technique, _ in pairs(small)]
    found = doctor.examine(attends, ask(attends, 128)).findings
    assert [f.where for f in found].count("model.connector.attn.out_proj") == 1
    assert ("4-bit weights", "lm_head") in [(f.technique, f.where) for f in config_only.findings(attends)]
    assert (READ, "model.connector.attn.out_proj") in [(f.technique, f.where) for f in config_only.findings(attends)]
