"""Each family's adapter computes what the library computes, and exported models of many families answer as their sources do."""

import numpy as np
import pytest
import torch
from transformers import vision_utils

from mmrecipes import export, inference
from mmrecipes.errors import UserError
from mmrecipes.export import wrappers
from mmrecipes.export.onnx import int8_channels, replace_nodes
from mmrecipes.families import BY_NAME, idefics2, llava_next, minicpm_v, qwen_vl
from mmrecipes.inference.backends import onnx_session
from mmrecipes.models.messages import conversation
from tests import equality, families

GRIDS = [(2, 2), (4, 10), (14, 4), (6, 6), (2, 30), (34, 22)]  # patches: rows and columns, multiples of the merge of 2


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_places_of_patches(grid):
    thw = torch.tensor([[1, *grid]])
    assert np.array_equal(qwen_vl.in_blocks(*grid, 2), vision_utils.get_vision_position_ids(thw, 2).numpy())
    order, window = qwen_vl.windows(*grid, {"merge": 2, "window": 3})
    wanted, borders = vision_utils.get_vision_window_index(thw, 2, window_size=48, patch_size=8)
    assert np.array_equal(order, wanted.numpy())
    sizes = np.unique_counts(window).counts[np.argsort(np.unique(window, return_index=True)[1])]
    assert np.array_equal(sizes, borders.diff().numpy())
    found = qwen_vl.interpolation(qwen_vl.in_blocks(*grid, 2), 8)
    options = {"num_grid_per_side": 8, "align_corners": True, "spatial_merge_size": 2}
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(thw, **options)
    table = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    made = [(table[i] * w[..., None]).sum(1) for i, w in (found, (indices.numpy(), weights.numpy()))]
    assert np.allclose(*made, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_positions_of_tokens(name):
    model = families.load(name)
    family, settings = BY_NAME[name], BY_NAME[name].settings(model)
    for case in equality.cases():
        inputs = conversation(model.processor, case.images, case.messages)
        given = {k: torch.from_numpy(np.asarray(v)) for k, v in inputs.items() if k in ("image_grid_thw", "mm_token_type_ids")}
        wanted = model.model.get_rope_index(torch.from_numpy(inputs["input_ids"]), **given)[0]
        assert np.array_equal(family.positions(inputs, settings), wanted.numpy()), case.name


MANY_SHAPES = ["llava_next", "llava_onevision", "idefics2", "pixtral", "mistral3", "qwen3_vl", "internvl", "minicpmv4_6"]


@pytest.mark.parametrize("name", MANY_SHAPES)
def test_visual_tokens_are_the_models_own(name):
    """Run by run through the vision graph's module, merged: as the whole model makes them of the same images."""
    model = families.load(name)
    family = wrappers.family_of(model)
    graph, settings = wrappers.VisionGraph(model, family).eval(), family.settings(model)
    for case in (case for case in equality.cases() if case.images):
        inputs = conversation(model.processor, case.images, case.messages)
        tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in inputs.items()}
        names = ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw", "pixel_attention_mask", "target_sizes")
        names = [n for n in names if n in tensors and (n != "batch_num_images" or name == "llava_onevision")]
        with torch.no_grad():
            wanted = model.model.get_image_features(**{n: tensors[n] for n in names}, return_dict=True).pooler_output
            runs = [{k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in r.items()} for r in family.images(inputs, settings)]
            found = family.merge([graph(**run).numpy() for run in runs], inputs, settings)
        wanted = torch.cat([each.flatten(0, -2) for each in wanted]).numpy()
        assert np.allclose(found[:, : wanted.shape[1]], wanted, atol=1e-5), case.name
        assert len(found) == (inputs["input_ids"] == model.config.image_token_id).sum()


def test_tokens_of_many_tiles_are_scaled_down():
    """Against torch's own bilinear interpolation, also where rows and columns shrink by different shares."""
    laid = np.random.default_rng(1).normal(size=(20, 31, 3)).astype(np.float32)
    found = llava_next.fewer(laid, {"most": 4, "side": 5})
    wanted = torch.nn.functional.interpolate(torch.from_numpy(laid).permute(2, 0, 1)[None], found.shape[:2], mode="bilinear")
    assert found.shape[0] * found.shape[1] < len(laid) * 31
    assert np.allclose(found, wanted[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_positions_of_slices():
    """MiniCPM-V's nearest learned positions, and its patches in nested blocks: each once, 2 x 2 inside 4 x 4."""
    for count in range(1, 80):
        wanted = vision_utils.get_vision_nearest_position_ids(torch.tensor([[1, count]]), 14)
        assert np.array_equal(minicpm_v.nearest(count, 14), wanted.numpy()), count
    places = minicpm_v.nested(8, 12, 2)
    assert len(np.unique(places, axis=0)) == 96
    for block in (2, 4):
        joined = places.reshape(-1, block**2, 2)
        assert (joined // block == joined[:, :1] // block).all()


def test_positions_by_share():
    for count in range(1, 60):
        ratio = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
        wanted = torch.bucketize(ratio.clamp(max=1.0 - 1e-6), torch.arange(1 / 14, 1.0, 1 / 14), right=True)
        assert np.array_equal(idefics2.positions(count, 14), wanted.numpy()), count


WAYS = [("qwen2_5_vl", "onnx"), ("gemma3", "onnx"), ("llava_onevision", "onnx"), ("mistral3", "onnx"), ("idefics2", "onnx")]
WAYS += [("qwen3_vl", "openvino"), ("paligemma", "openvino"), ("qwen3_5", "onnx"), ("minicpmv4_6", "openvino")]


@pytest.mark.parametrize(("name", "runtime"), WAYS)
def test_answers_as_the_source_does(name, runtime, tmp_path):
    """The same greedy tokens as the model's own `generate` in every case, alone and in a batch of all of them."""
    model = families.load(name)
    loaded = inference.load_exported(export.export(model, tmp_path / "out", runtime, batches=True))
    outcomes = list(equality.compare(model, loaded, 8))
    assert len(outcomes) >= 7
    for outcome in outcomes:
        assert outcome.found == outcome.wanted, outcome.case
        # rounding to float32 alone moves the logits of these random hybrid decoders by up to 5e-5, in PyTorch, too
        assert outcome.error < (1e-4 if loaded.family.piece else 1e-5)
    cases = [(case.images or None, case.messages) for case in equality.cases() if case.name in {o.case for o in outcomes}]
    alone = [loaded.generate(*case, max_new_tokens=8) for case in cases]
    assert len(set(alone)) > 1
    assert loaded.generate_batch(cases, max_new_tokens=8) == alone


def test_generation_rules_are_kept(tmp_path):
    """A repetition penalty and tokens that never come, as `generate` applies them."""
    model = families.load("llava")
    plain = model.generation_config.to_dict()
    case = equality.cases()[0]
    first = equality.source_answer(model, case)[0]
    try:
        model.generation_config.update(repetition_penalty=1.4, bad_words_ids=[[first[0]], [first[1], first[2]]])
        loaded = inference.load_exported(export.export(model, tmp_path / "out"))
        wanted = equality.source_answer(model, case)[0]
    finally:
        model.generation_config.update(**plain)
    assert list(loaded.tokens(loaded.inputs(case.images, case.messages), 12)) == wanted != first


def test_no_batches_unless_asked_for(tmp_path):
    loaded = inference.load_exported(export.export(families.load("llava"), tmp_path / "out"))
    with pytest.raises(UserError, match="export it with batches=True"):
        loaded.generate_batch([(None, "Hello?")])


@pytest.mark.parametrize(("name", "expected"), [("gemma3", True), ("llava", False), ("qwen2_5_vl", False), ("mistral3", False)])
def test_windows_are_known_from_the_config(name, expected):
    """Only without one may a graph go without the mask."""
    config = families.load(name).config.get_text_config()
    assert wrappers.windows(config) is expected
    if name == "mistral3":
        config = type(config)(**config.to_dict() | {"sliding_window": 16, "layer_types": None})
        assert wrappers.windows(config)


def test_weights_that_one_file_cannot_hold_lie_beside_it(monkeypatch, tmp_path):
    """As for a vision encoder of more than 2 GB: the graph is the same, and int8 is made of it, too."""
    from mmrecipes.export.onnx import graphs

    model = families.load("qwen2_5_vl")
    encoder, run, free = wrappers.vision_graph(model)
    with torch.no_grad():
        wanted = encoder.eval()(**run).numpy()
    monkeypatch.setattr(graphs, "MAX_BYTES", 1000)
    path = graphs.to_onnx(encoder, run, tmp_path / "vision.onnx", free)
    assert {p.name for p in tmp_path.iterdir()} == {"vision.onnx", "vision.onnx.data"}
    feeds = {name: x.numpy() for name, x in run.items()}
    assert np.allclose(onnx_session(path).run(None, feeds)[0], wanted, atol=1e-4)
    replace_nodes(path, int8_channels)
    rounded = onnx_session(path).run(None, feeds)[0]
    assert 0 < np.linalg.norm(rounded - wanted) / np.linalg.norm(wanted) < 0.1
