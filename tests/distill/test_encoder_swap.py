"""Another vision encoder: put in, taught in three steps, saved with its code, exported; and what does not fit is refused."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from mmrecipes import data, distill, evaluate, export, inference, models, train
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.export import onnx as onnx_export
from mmrecipes.mini import curriculum
from mmrecipes.prune import token_merging

CONFIG = train.TrainConfig(6, 4, 0.01, 2e-3)


def chats(house):
    return curriculum.chat_batches("encoder-swap", CONFIG, house.processor.tokenizer)


@pytest.fixture(scope="module")
def house(house_vlm):
    return models.load(house_vlm)


@pytest.fixture(scope="module")
def shuffled(house):
    return distill.swap_vision_encoder(house, distill.ENCODERS["ShuffleNetV2 1.0x"])


def pixels(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", distill.ENCODERS)
def test_every_encoder_gives_a_token_for_each_place_and_the_language_model_stays(house, name):
    swapped = distill.swap_vision_encoder(house, distill.ENCODERS[name])
    found = models.parts(swapped)
    with torch.no_grad():
        tokens = found["vision"](pixels(2)).last_hidden_state
        visual = found["connector"](tokens)
    assert tokens.shape == (2, 64, swapped.config.vision_config.hidden_size)
    assert visual.shape == (2, 64, house.config.text_config.hidden_size) and torch.isfinite(visual).all()
    old = models.parts(house)
    for part in ("language", "head"):
        for (key, own), other in zip(found[part].state_dict().items(), old[part].state_dict().values(), strict=True):
            assert torch.equal(own, other), key
    again = distill.swap_vision_encoder(house, distill.ENCODERS[name]).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in swapped.state_dict().items()), "the same seed, the same weights"
    trained = sum(p.numel() for p in found["vision"].parameters())
    loss = found["vision"].train()(pixels(2)).last_hidden_state.square().mean()
    loss.backward()
    used = sum(p.numel() for p in found["vision"].parameters() if p.grad is not None)
    assert used > 0.9 * trained, "hardly any weight is carried along unused"


def test_places_lie_in_the_order_of_the_vits(shuffled):
    tower, picture = models.parts(shuffled)["vision"].eval(), pixels(1)
    fine = [m for m in tower.maps(picture) if m.shape[-1] == 8][-1]
    tokens = tower(picture).last_hidden_state
    assert torch.equal(tokens[0, 8 * 2 + 5, : fine.shape[1]], fine[0, :, 2, 5]), "token 21 is row 2, column 5"


def test_features_connector_everything(house, shuffled, tmp_path):
    longer = train.TrainConfig(12, 8, 0.02, 4e-3)
    images = curriculum.image_batches("encoder-swap", longer)
    first = distill.match_features(shuffled, house, images, longer, tmp_path / "features")
    log = train.read_log(tmp_path / "features")["features"]
    assert log[-1] < log[0]
    second = distill.align_connector(first, house, chats(house), CONFIG, tmp_path / "connector")
    one, two = first.state_dict(), second.state_dict()
    moved = {k for k in one if not torch.equal(one[k], two[k])}
    assert moved == {"model.connector.modality_projection.proj.weight"}, "not even a batch norm's statistics moved"
    third = distill.distill(second, house, chats(house), CONFIG, work=tmp_path / "all")
    parts = {k.split(".")[1] for k, v in third.state_dict().items() if not torch.equal(v, two[k])}
    assert {"vision_model", "connector", "text_model"} <= parts
    assert torch.isfinite(evaluate.answer_logits(third, data.test_split(4))[0]).all()


def test_the_map_of_the_features_becomes_the_connector(house, shuffled, tmp_path):
    """What the map gives, through the old connector, is what the new connector gives: nothing is lost by folding."""
    config = train.TrainConfig(2, 4, 0.01, 2e-3)
    first = distill.match_features(shuffled, house, curriculum.image_batches("encoder-swap", config), config, tmp_path)
    state = torch.load(tmp_path / "checkpoint" / "pytorch_model.bin", weights_only=True)
    learned = next(v for k, v in state.items() if k.endswith("connector.weight"))
    old, new = models.parts(house), models.parts(first)
    with torch.no_grad():
        features = new["vision"](pixels(1)).last_hidden_state
        assert torch.allclose(new["connector"](features), old["connector"](features @ learned.T), atol=1e-4)


def test_a_map_folds_behind_a_pixel_shuffle(house):
    coarse = token_merging.coarser(house, 2)
    swapped = distill.swap_vision_encoder(coarse, distill.ENCODERS["ShuffleNetV2 1.0x"])
    old, new, width = models.parts(coarse), models.parts(swapped), swapped.config.vision_config.hidden_size
    linear = torch.randn(256, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    distill.fold_map_(swapped, coarse, linear)
    with torch.no_grad():
        features = new["vision"](pixels(2)).last_hidden_state
        visual = new["connector"](features)
        assert visual.shape == (2, 16, 256)
        assert torch.allclose(visual, old["connector"](features @ linear.T), atol=1e-4)
    assert evaluate.vqa(swapped, data.test_split(2), progress=False).overall.n == 2


@pytest.mark.parametrize("name", ["ShuffleNetV2 1.0x", "EfficientFormer-L1", "SwiftFormer-XS"])
def test_it_is_saved_with_its_code_and_loads_without_this_package(house, name, tmp_path):
    swapped = distill.swap_vision_encoder(house, distill.ENCODERS[name])
    models.save(swapped, house.processor, tmp_path / "swapped", dtype=torch.float32)
    with pytest.raises(UserError, match="trust_remote_code"):
        models.load(tmp_path / "swapped")
    picture, question = scenes.render(scenes.make_scene(3), 128), "How many circles are there?"
    again = models.load(tmp_path / "swapped", trust_remote_code=True)
    inputs = models.chat(swapped, picture, question)
    with torch.no_grad():
        wanted = swapped(**inputs).logits
        assert torch.allclose(again(**inputs).logits, wanted, atol=1e-5)
    torch.save({"inputs": dict(inputs), "wanted": wanted}, tmp_path / "wanted.pt")
    code = """
        import sys, torch
        sys.modules["mmrecipes"] = None
        from transformers import AutoModelForImageTextToText
        model = AutoModelForImageTextToText.from_pretrained("swapped", trust_remote_code=True).eval()
        kept = torch.load("wanted.pt")
        with torch.no_grad():
            assert torch.allclose(model(**kept["inputs"]).logits, kept["wanted"], atol=1e-5)
        print("the same")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert "the same" in done.stdout, done.stderr[-2000:]


def test_it_is_exported_with_an_encoder_in_static_int8(house, shuffled, tmp_path):
    pictures = [scenes.render(scenes.make_scene(s), 128) for s in data.SPLITS["calibration"][:4]]
    precisions = {"vision": "static", "language": "int8"}
    folder = export.export(shuffled, tmp_path / "small", "onnx", precisions, images=pictures)
    assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()
    loaded = inference.load_exported(folder)
    floats = export.export(shuffled, tmp_path / "floats", "onnx")
    asked = (pictures[0], "How many circles are there?")
    assert inference.load_exported(floats).generate(*asked, 8) == models.ask(shuffled, *asked, 8)
    assert np.isfinite(loaded.prefill(loaded.inputs(*asked))).all()
    sizes = [sum(f.stat().st_size for f in p.glob("vision*")) for p in (folder, floats)]
    assert sizes[0] < 0.35 * sizes[1], "convolutions are in int8, too"


def test_a_calibrated_convolution_agrees_with_float(shuffled, tmp_path):
    tower, x = models.parts(shuffled)["vision"].eval(), pixels(8)
    floats = onnx_export.vision_to_onnx(tower, x, tmp_path / "floats.onnx")
    config = onnx_export.StaticConfig(layers="all")
    small = onnx_export.tensor_session(onnx_export.static_int8(floats, [x], tmp_path / "small.onnx", config))
    wanted = tower(x).last_hidden_state.detach()
    assert (small(x) - wanted).norm() / wanted.norm() < 0.2


def test_some_convolutions_can_stay_in_float(shuffled, tmp_path):
    import onnx

    tower, x = models.parts(shuffled)["vision"].eval(), pixels(8)
    floats = onnx_export.vision_to_onnx(tower, x, tmp_path / "float.onnx")
    sizes, errors, wanted = {}, {}, tower(x).last_hidden_state.detach()
    for name, keep in {"all": (), "kept": ("stages.2", "top")}.items():
        config = onnx_export.StaticConfig(layers="convolutions" if keep else "all", keep=keep)
        path = onnx_export.static_int8(floats, [x], tmp_path / f"{name}.onnx", config)
        graph = onnx.load(path).graph
        dequantized = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
        sizes[name] = sum(n.op_type == "Conv" and n.input[1] in dequantized for n in graph.node)
        errors[name] = (onnx_export.tensor_session(path)(x) - wanted).norm() / wanted.norm()
    convolutions = sum(n.op_type == "Conv" for n in onnx.load(floats).graph.node)
    assert sizes["all"] == convolutions and 0 < sizes["kept"] < convolutions and errors["kept"] < errors["all"]
    with pytest.raises(UserError, match="no module of that name"):
        onnx_export.static_int8(floats, [x], tmp_path / "none.onnx", onnx_export.StaticConfig(keep=("no_such_layer",)))
    assert not (tmp_path / "none.onnx").exists()


def test_openvino_takes_it_in_static_int8(shuffled, tmp_path):
    pictures = [scenes.render(scenes.make_scene(s)) for s in data.SPLITS["calibration"][:4]]
    asked = (pictures[0], "How many circles are there?")
    found = {}
    for vision, given in (("fp32", ()), ("static", pictures)):
        precisions = {"vision": vision, "language": "fp32"}
        found[vision] = inference.load_exported(export.export(shuffled, tmp_path / vision, "openvino", precisions, images=given))
    assert found["fp32"].generate(*asked, 8) == models.ask(shuffled, *asked, 8)
    logits = [m.prefill(m.inputs(*asked)) for m in found.values()]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.5 * np.abs(logits[0]).max()
    sizes = [sum(f.stat().st_size for f in (tmp_path / v).glob("vision*")) for v in found]
    assert sizes[1] < 0.5 * sizes[0]


def test_what_does_not_fit_is_refused(house, foreign_vlm):
    with pytest.raises(UserError, match="expected an Idefics3"):
        distill.swap_vision_encoder(models.load(foreign_vlm), distill.ENCODERS["ShuffleNetV2 1.0x"])
    with pytest.raises(UserError, match=r"no_such_net.*give one of ENCODERS"):
        distill.swap_vision_encoder(house, {"model_type": "no_such_net"})
    with pytest.raises(UserError, match="8 x 8 places"):
        distill.swap_vision_encoder(house, {"model_type": "bert"})
    with pytest.raises(UserError, match="do not fit"):
        distill.swap_vision_encoder(house, distill.ENCODERS["ShuffleNetV2 1.0x"], start=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="no images"):
        distill.least_squares_map(house, house, pixels(0))
    with pytest.raises(UserError, match="0 images"):
        evaluate.image_text_matching(house, n=0)


def test_the_map_of_an_encoder_to_itself_is_the_identity(house):
    found = distill.least_squares_map(house, house, pixels(8) + torch.linspace(-1, 1, 128))
    x = models.parts(house)["vision"](pixels(1)).last_hidden_state.detach()
    assert (x @ found.T - x).norm() < 0.1 * x.norm()


def test_muon_takes_convolutions_as_matrices():
    from mmrecipes.train.optim import Muon, optimizers

    mixing, depthwise = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(4, 4, 3, groups=4)
    both = torch.nn.ModuleDict({"mixing": mixing, "depthwise": depthwise})
    by_muon, by_adam = optimizers([both], 0.1, 0.1)
    assert isinstance(by_muon, Muon)
    assert [tuple(p.shape) for g in by_muon.param_groups for p in g["params"]] == [(6, 4, 3, 3)]
    assert any(p is depthwise.weight for g in by_adam.param_groups for p in g["params"])
    flat = torch.nn.Parameter(mixing.weight.detach().flatten(1).clone())
    steppers = [Muon([mixing.weight], 0.1), Muon([flat], 0.1)]
    mixing.weight.grad = torch.randn(6, 4, 3, 3)
    flat.grad = mixing.weight.grad.flatten(1)
    for stepper in steppers:
        stepper.step()
    assert torch.allclose(mixing.weight.flatten(1), flat), "as the matrix that it is"


def test_frozen_parts_stay_in_eval_mode():
    frozen = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).requires_grad_(False)
    model = torch.nn.ModuleDict({"frozen": frozen, "learns": torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))})
    seen = []

    def loss(m, batch):
        seen.append((m["frozen"][1].training, m["learns"][0].training))
        return m["learns"](m["frozen"](batch).mean((2, 3))).square().mean(), {}

    before = frozen[1].running_mean.clone()
    train.fit(model, [torch.randn(4, 3, 8, 8)] * 2, loss, train.TrainConfig(2, 4))
    assert seen == [(False, True)] * 2 and torch.equal(frozen[1].running_mean, before)


def test_a_vlm_is_asked_what_fits_a_picture(house, shuffled):
    yes, both, right = evaluate.image_text_matching(house, n=40)
    assert yes.n == 80 and both.n == len(right) == 40 and sum(right) == round(40 * both.value)
    assert both.value > 0.9, "what mini-vlm answers nearly always right"
    assert evaluate.image_text_matching(shuffled, n=40)[1].value < 0.5, "an encoder that was not taught cannot tell"
