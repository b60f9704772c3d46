"""A model exported for ExecuTorch answers like its source, within the length its cache was given."""

import pytest
import torch

import tiny
from mmrecipes import data, export, inference, measure, models, quantize
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.export import executorch
from tests import families

# the largest relative error of logits seen is a half or less of these; XNNPACK's GELU is an approximation
CLOSE = {"fp32": 1e-3, "int8": 0.1, "int4": 0.4}


@pytest.fixture(scope="module")
def vlm(house_vlm):
    return models.load(house_vlm)


@pytest.fixture(scope="module")
def loaded(house_exports):
    """The fp32 export; results/exported.json has the other precisions of this model, which take minutes to write."""
    return inference.load_exported(house_exports("executorch", "fp32"), threads=1)


def test_answers_like_its_source(vlm, loaded):
    rows = data.test_split(14)
    assert max(export.parity(vlm, loaded, CLOSE["fp32"]).values()) <= CLOSE["fp32"]
    assert all(loaded.generate(r["image"], r["question"]) == models.ask(vlm, r["image"], r["question"]) for r in rows)
    assert measure.profile_exported(loaded.folder, rows[0]["image"], rows[0]["question"])["tokens_per_s"] > 0, (
        "alone in a process, too"
    )


def test_conversations(vlm, loaded):
    rows = data.test_split(2)
    for pictures, text in ((None, ""), ([r["image"] for r in rows], "How many?"), (rows[0]["image"], "Is there a star? " * 20)):
        inputs = loaded.inputs(pictures, text)
        with torch.inference_mode():
            wanted = vlm(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits[0, -1].numpy()
        assert abs(loaded.prefill(inputs) - wanted).max() < 2e-3 * abs(wanted).max()
    with pytest.raises(UserError, match="shorten it"):
        loaded.generate(None, "word " * 20_000)


@pytest.mark.parametrize("way", CLOSE)
def test_a_foreign_model_and_a_damaged_file(way, tmp_path):
    llava = tiny.llava()
    loaded = inference.load_exported(export.export(llava, tmp_path / "llava", "executorch", way))
    assert max(export.parity(llava, loaded, CLOSE[way]).values()) <= CLOSE[way]
    if way == "fp32":
        picture = scenes.render(scenes.make_scene(3), 64)
        assert loaded.generate(picture, "What?", 6) == models.ask(llava, picture, "What?", 6)
        whole = (tmp_path / "llava" / "language.pte").read_bytes()
        (tmp_path / "llava" / "language.pte").write_bytes(whole[:1000])
        with pytest.raises(UserError, match=r"language\.pte: not the file"):
            inference.load_exported(tmp_path / "llava")
        with pytest.raises(UserError, match="cannot load it"):
            inference.load_exported(tmp_path / "llava", check=False)


def test_weights_rounded_before_are_not_rounded_again(vlm):
    """Half of the layers are on a grid of 4 bits: a layer of the program has their very numbers."""
    width = dict.fromkeys(list(quantize.units(vlm))[:2], 4)
    small = quantize.apply_plan(vlm, width, 32, data.calibration(8))
    layer = small.get_submodule(next(iter(quantize.bits_by_module(small, width))))
    before = layer.weight.detach().clone()
    holder = torch.nn.Sequential(layer)
    executorch._quantize(holder, "mixed")
    found = holder[0](torch.eye(before.shape[1]))  # activations are rounded, too: 1 to itself
    bias = 0 if layer.bias is None else layer.bias
    off = ((found - bias).T - before).norm() / before.norm()
    assert off < 0.05, "XNNPACK has no negative scales, so a few groups lose their outermost mark"


@pytest.mark.parametrize(
    ("family", "why"),
    [("qwen3_vl", "any shape"), ("pixtral", "any shape"), ("gemma3", "see each other"), ("paligemma", "see each other")],
)
def test_what_its_attention_would_get_wrong_silently_is_refused(family, why, tmp_path):
    model = families.FAMILIES[family]()
    with pytest.raises(UserError, match=rf"\({family}\) cannot be exported for executorch: .*{why}.*; use onnx or openvino"):
        export.export(model, tmp_path / "out", "executorch")
    export.supported(model, "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "llava", "internvl"])
def test_decoders_that_only_look_back_are_taken_unless_through_a_window(family):
    model = families.FAMILIES[family]()
    export.supported(model, "executorch")
    config = model.config.get_text_config()
    config.sliding_window = 16
    if getattr(config, "layer_types", None):  # Qwen's say of each layer whether it looks through the window
        export.supported(model, "executorch")
        config.layer_types = ["sliding_attention", *config.layer_types[1:]]
    with pytest.raises(UserError, match="look back only 16 tokens"):
        export.supported(model, "executorch")


def test_the_cache_has_room_for_what_the_manifest_promises(vlm, loaded):
    max_length = loaded.manifest["max_length"]
    ids = torch.full((1, max_length), vlm.processor.tokenizer("red").input_ids[0])
    loaded.graphs.reset()
    loaded.graphs.step(ids[:, :-1].numpy())
    last = loaded.graphs.step(ids[:, -1:].numpy())
    with torch.inference_mode():
        wanted = vlm(input_ids=ids).logits[0, -1].numpy()
    assert abs(last - wanted).max() < 2e-3 * abs(wanted).max(), "the last place is there, too"
    eos, loaded.manifest["eos_token_ids"] = loaded.manifest["eos_token_ids"], []  # else it may stop by itself
    found = len(list(loaded.tokens({"input_ids": ids[:, :-1].numpy()}, 8)))
    loaded.manifest["eos_token_ids"] = eos
    assert found == 2, "the last place holds the first token generated, and the second needs none"
