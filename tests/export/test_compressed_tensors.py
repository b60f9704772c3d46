"""Checkpoints for vLLM: transformers loads them, they compute what our own rounding does, and 4 bits by GPTQ stay as they are."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from mmrecipes import data, evaluate, export, models, quantize
from mmrecipes.errors import ParityError, UserError
from mmrecipes.export import compressed_tensors
from mmrecipes.quantize.groups import GROUP
from tests import families

RUNTIME = compressed_tensors.RUNTIME


@pytest.fixture(scope="module")
def vlm(house_vlm):
    return models.load(house_vlm)


@pytest.fixture(scope="module")
def language(vlm):
    """The names of the language model's linear layers."""
    part = models.part_of(vlm)
    return [n for n, _ in models.linears(vlm) if part[f"{n}.weight"] == "language"]


@pytest.fixture(scope="module")
def by_gptq(vlm, language):
    return quantize.calibrate(vlm, data.calibration(8), dict.fromkeys(language, 4), group_size=GROUP)


@pytest.fixture(scope="module", params=["w4a16", "w8a8"])
def written(request, by_gptq, vlm, tmp_path_factory):
    """A precision, the model that was exported, and its checkpoint: W4A16 of weights by GPTQ, W8A8 of the float ones."""
    model = by_gptq if request.param == "w4a16" else vlm
    out = tmp_path_factory.mktemp("checkpoints") / request.param
    return request.param, model, export.export(model, out, RUNTIME, request.param)


def narrow(model):
    """One layer of the language model gets a width that groups of 32 do not divide."""
    models.layers(model)["language"][0].mlp.down_proj = torch.nn.Linear(40, 8, bias=False)
    return model


def stored(folder, name):
    """What the file itself says of one weight, read without the library: (out, in), float32."""
    found = load_file(folder / "model.safetensors")
    scale = found[f"{name}.weight_scale"].float()
    if f"{name}.weight_packed" in found:
        packed, (rows, columns) = found[f"{name}.weight_packed"], found[f"{name}.weight_shape"].tolist()
        levels = torch.stack([(packed >> 4 * i) & 15 for i in range(8)], -1).view(rows, columns) - 8
    else:
        levels = found[f"{name}.weight"]
        assert levels.dtype == torch.int8
    return (levels.view(len(levels), scale.shape[1], -1) * scale[..., None]).view(levels.shape)


def test_transformers_alone_loads_it_and_computes_our_rounding(written):
    """In float32, the logits of a question with its answer, all tokens: far nearer than the rounding has moved them."""
    from transformers import AutoModelForImageTextToText

    precision, model, folder = written
    found = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found.processor = model.processor
    rows = data.test_split(8)
    expected = compressed_tensors.rounded(model, compressed_tensors.layer_schemes(model, precision))
    wanted, logits, whole = (evaluate.answer_logits(m, rows)[0] for m in (expected, found, model))
    near = ((logits - wanted).norm() / wanted.norm()).item()
    assert near <= compressed_tensors.TOLERANCE[precision]
    if precision == "w8a8":
        assert near < 0.5 * ((logits - whole).norm() / whole.norm()).item()


def test_the_file_holds_our_levels(written, language):
    precision, model, folder = written
    expected = compressed_tensors.rounded(model, dict.fromkeys(language, precision))
    for name in (language[0], language[-1]):
        assert torch.equal(stored(folder, name), expected.get_submodule(name).weight)
    found = load_file(folder / "model.safetensors")
    others = [t.dtype for k, t in found.items() if k.removesuffix(".weight") not in language and "language" not in k]
    assert set(others) <= {torch.bfloat16, torch.int32, torch.int64}


def test_gptq_keeps_its_levels(by_gptq, language, tmp_path):
    """Scales alone are rounded, to bf16: 2^-9 at most; and some are negative, as ours may be."""
    schemes = compressed_tensors.layer_schemes(by_gptq, "w4a16")
    assert list(schemes) == language
    small = compressed_tensors.rounded(by_gptq, schemes)
    for name in language:
        own, kept = (m.get_submodule(name).weight for m in (by_gptq, small))
        assert ((kept - own).abs() <= 2**-8 * own.abs() + 1e-12).all()
    assert any((compressed_tensors.scales(by_gptq.get_submodule(n).weight, "w4a16") < 0).any() for n in language)


def test_the_config_names_what_stays(written, language, vlm):
    """Exactly the language model's layers are targets; vision encoder, connector and head are not."""
    precision, _, folder = written
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors" and quantization["quantization_status"] == "compressed"
    assert quantization["ignore"] == ["re:.*vision_model.*", "re:.*connector.*", "re:.*lm_head.*"]
    assert quantization["format"] == {"w4a16": "pack-quantized", "w8a8": "int-quantized"}[precision]
    assert config["dtype"] == "bfloat16"
    names = {k.removesuffix(".weight_scale") for k in load_file(folder / "model.safetensors") if k.endswith("weight_scale")}
    assert names == set(language)


def test_answers_stay(written, vlm):
    """As many answers as the original's within 3 of 100: W8A8 and 4 bits by GPTQ lose less than a point (results/README.md)."""
    rows = data.test_split(100)
    before, after = (evaluate.vqa(m, rows) for m in (vlm, models.load(written[2])))
    assert evaluate.paired(before.right, after.right).lost <= 5
    assert evaluate.agreement(after.predictions, before.predictions).value >= 0.9


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl"])
@pytest.mark.parametrize("precision", ["w4a16", "w8a8"])
def test_foreign_families(name, precision, tmp_path):
    """`export` keeps a checkpoint only if transformers computes our rounding with it; every language layer is in it."""
    model = families.load(name)
    folder = export.export(model, tmp_path / "out", RUNTIME, precision)
    schemes = compressed_tensors.layer_schemes(model, precision)
    scales = [k for k in load_file(folder / "model.safetensors") if k.endswith("weight_scale")]
    assert len(scales) == len(schemes) > 0 and not [k for k in scales if "vis" in k or "projector" in k]


def test_mixed_keeps_what_has_4_bits_and_takes_8_for_the_rest(vlm, language, tmp_path):
    half = {unit: 4 for i, unit in enumerate(quantize.units(vlm)) if i % 2 and "text_model.layers" in unit}
    model = quantize.apply_plan(vlm, half, GROUP)
    four = {n for unit in half for n in quantize.units(vlm)[unit]}
    schemes = compressed_tensors.layer_schemes(model, "mixed")
    assert {n for n, s in schemes.items() if s == "w4a16"} == four and len(four) < len(schemes)
    folder = export.export(model, tmp_path / "mixed", RUNTIME, "mixed")
    packed = {k.removesuffix(".weight_packed") for k in load_file(folder / "model.safetensors") if k.endswith("weight_packed")}
    assert packed == four


def test_a_broken_checkpoint_is_not_kept(vlm, tmp_path, monkeypatch):
    """One layer's scales twice as large in the file: its logits give it away, and the older checkpoint stays."""
    out = models.save(vlm, vlm.processor, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    save = compressed_tensors._save

    def broken(model, schemes, folder):
        save(model, schemes, folder)
        from safetensors.torch import save_file

        tensors = load_file(folder / "model.safetensors")
        tensors[next(k for k in tensors if k.endswith("down_proj.weight_scale"))] *= 2
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(compressed_tensors, "_save", broken)
    with pytest.raises(ParityError, match="the checkpoint's logits are"):
        export.export(vlm, out, RUNTIME, "w4a16")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("make", "precision", "more", "message"),
    [
        (tiny.house, "int4", {}, "expected one of w4a16, w8a8, mixed"),
        (lambda: tiny.house().bfloat16(), "w8a8", {}, "load the model with dtype=torch.float32"),
        (lambda: narrow(tiny.house()), "w4a16", {}, "which groups of 32 do not divide; use precision='w8a8'"),
        (lambda: models.load("mini-siglip"), "w8a8", {}, "is for models that answer"),
        (lambda: models.load("mini-resampler"), "w8a8", {}, "code of its own"),
        (lambda: families.load("blip2"), "w8a8", {}, "there is no recipe for"),
        (tiny.house, "w8a8", {"batches": True}, "without images to calibrate on or batches"),
    ],
    ids=["precision", "bf16", "width", "dual", "own code", "family", "batches"],
)
def test_refused_in_one_line(make, precision, more, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        export.export(make(), tmp_path / "out", RUNTIME, precision, **more)
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())
