"""The graphs compute what the model does, in fp32 and near it in int8, and `attach` answers through them."""

import contextlib
import logging

import numpy as np
import pytest
import torch

import tiny
from mmrecipes import data, evaluate, export, inference, models, quantize
from mmrecipes.errors import ParityError, UserError
from mmrecipes.export import onnx as onnx_export
from mmrecipes.export.onnx import backend
from tests import families


@pytest.fixture(scope="module")
def vlm(house_vlm):
    return models.load(house_vlm)


@pytest.fixture(scope="module")
def graphs(vlm, tmp_path_factory):
    return onnx_export.export_parts(vlm, tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def batches(vlm):
    """Batches of 1 and 3 questions of unequal length, so that the shorter ones are padded on the left."""
    rows = data.test_split(4)
    return [next(models.teacher_forced(vlm, rows.select(at)))[0] for at in ([0], [1, 2, 3])]


def relative(model, twin, inputs):
    with torch.inference_mode():
        wanted, found = (m(**inputs).logits for m in (model, twin))
    real = inputs["attention_mask"].bool()
    assert torch.isfinite(found).all()
    return ((found - wanted)[real].norm() / wanted[real].norm()).item()


def test_fp32_graphs_compute_what_the_model_does(vlm, graphs, batches):
    twin = onnx_export.attach(vlm, graphs)
    assert (batches[1]["attention_mask"] == 0).any(), "the test must see left padding"
    for inputs in batches:
        assert relative(vlm, twin, inputs) < 1e-4
    for part in export.PARTS:  # one part alone in ONNX Runtime, the other in PyTorch
        assert relative(vlm, onnx_export.attach(vlm, {part: graphs[part]}), batches[1]) < 1e-4


def test_attention_is_fused(graphs):
    import onnx

    kinds = [node.op_type for node in onnx.load(graphs["vision"]).graph.node]
    assert "MultiHeadAttention" in kinds and "Softmax" not in kinds


def test_answers_through_attach(vlm, graphs):
    rows, twin = data.test_split(14), onnx_export.attach(vlm, graphs)
    questions = rows["image"][:], rows["question"][:]
    assert evaluate.answers(twin, *questions) == evaluate.answers(vlm, *questions)
    assert models.ask(twin, rows[0]["image"], rows[0]["question"]) == models.ask(vlm, rows[0]["image"], rows[0]["question"])
    assert twin.processor is vlm.processor
    assert vlm.generation_config.use_cache is not False, "the parent must keep its cache"


def test_a_picture_is_looked_at_once_an_answer(vlm, graphs):
    seen, twin = [], onnx_export.attach(vlm, graphs)
    twin.model.vision_model.register_forward_hook(lambda *_: seen.append(1))
    rows = data.test_split(1)
    inputs = models.chat(twin, rows[0]["image"], rows[0]["question"])
    out = twin.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    assert len(seen) == 1


def feeds_of(vlm, inputs):
    """What flows into both graphs for one batch."""
    seen = {}
    core = vlm.model
    hooks = [
        core.vision_model.register_forward_pre_hook(lambda _, a, k: seen.update(vision=k), with_kwargs=True),
        core.text_model.register_forward_pre_hook(lambda _, a, k: seen.update(language=k), with_kwargs=True),
    ]
    with torch.inference_mode():
        vlm(**inputs)
    for hook in hooks:
        hook.remove()
    names = {"vision": ["pixel_values"], "language": ["inputs_embeds", "attention_mask"]}
    return {part: {n: seen[part][n].numpy() for n in names[part]} for part in names}


def test_int8_is_near_its_parent_and_smaller(vlm, graphs, batches, tmp_path):
    feeds = feeds_of(vlm, next(models.teacher_forced(vlm, data.calibration(24), 24))[0])
    error, seven_bits = {}, onnx_export.StaticConfig(reduce_range=True)
    for name, make in {
        "dynamic": lambda part, out: onnx_export.dynamic_int8(graphs[part], out),
        "static": lambda part, out: onnx_export.static_int8(graphs[part], [feeds[part]], out, seven_bits),
    }.items():
        small = {part: make(part, tmp_path / f"{name}-{part}.onnx") for part in export.PARTS}
        assert all(small[p].stat().st_size < graphs[p].stat().st_size / 2.5 for p in small)
        error[name] = relative(vlm, onnx_export.attach(vlm, small), batches[1])
    assert 1e-4 < error["dynamic"] < 0.15
    assert 1e-4 < error["static"] < 0.3
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}-{p}.onnx" for n in error for p in export.PARTS)


def product(weight, tmp_path):
    """A graph of one matrix product."""
    layer = torch.nn.Linear(*weight.T.shape, bias=False)
    layer.weight.data = weight
    return onnx_export.to_onnx(layer, {"input": torch.zeros(2, weight.shape[1])}, tmp_path / "one.onnx", {"input": {0: "rows"}})


def run(graph, x):
    return inference.onnx_session(graph).run(None, {"input": x})[0]


def test_default_int8_does_not_saturate(tmp_path):
    """Large products of one sign, which overflow 16 bits two at a time: the worst case of AVX2's int8 instruction."""
    graph, x = product(torch.full((16, 64), 0.5), tmp_path), np.full((4, 64), 2.0, dtype=np.float32)
    for i, options in enumerate([{}, {"weights": "int8", "reduce_range": True}]):
        small = onnx_export.dynamic_int8(graph, tmp_path / f"small{i}.onnx", **options)
        assert np.allclose(run(small, x), run(graph, x), rtol=0.02)


def test_idle_sessions_leave_the_cores_alone(graphs):
    """Threads that spin on after a run would take the cores from whatever is timed next."""
    options = inference.onnx_session(graphs["vision"], 2).get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.intra_op_num_threads == 2


def test_the_quick_conversion_writes_the_same_graph(tmp_path, monkeypatch):
    """A language model's: its rules (norms, rotary embedding, attention, products of one input) match several operators each."""
    llava, written = tiny.llava(layers=2), []
    for name, way in (("quick", backend.graphs.quick_conversion), ("plain", contextlib.nullcontext)):
        monkeypatch.setattr(backend.graphs, "quick_conversion", way)
        (tmp_path / name).mkdir()
        backend.write_onnx(llava, tmp_path / name, dict.fromkeys(export.PARTS, "fp32"), ())
        written.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert len(written[0]) == 4 and written[0] == written[1]


def test_plain_modules_export_too(tmp_path):
    siglip = tiny.siglip().vision_model

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = siglip

        def forward(self, pixel_values):
            return self.tower(pixel_values=pixel_values).pooler_output

    example = {"pixel_values": torch.randn(2, 3, 32, 32)}
    path = onnx_export.to_onnx(Pooled(), example, tmp_path / "siglip.onnx", {"pixel_values": {0: "batch"}})
    for n in (1, 2):
        x = torch.randn(n, 3, 32, 32)
        with torch.no_grad():
            wanted = Pooled()(x)
        assert np.allclose(inference.onnx_session(path).run(None, {"pixel_values": x.numpy()})[0], wanted, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_do_not_divide_into_groups_and_products_with_a_bias_are_packed(bits, tmp_path):
    """A look-up 36 wide, whose rows are padded to 64; a product that the exporter writes as Gemm, bias included."""
    import onnx

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Embedding(50, 36), torch.nn.Flatten(0, 1), torch.nn.Linear(36, 20)).eval()
    ids = torch.arange(6).reshape(1, 6)
    path = onnx_export.to_onnx(plain, {"input": ids}, tmp_path / "graph.onnx", {})
    assert "Gemm" in [node.op_type for node in onnx.load(path).graph.node], "the test must see one"
    backend.replace_nodes(path, backend.nbits(bits))
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "MatMulNBits" in kinds and "GatherBlockQuantized" in kinds and "Gemm" not in kinds
    with torch.inference_mode():
        wanted = plain(ids).numpy()
    found = run(path, ids.numpy())
    assert found.shape == wanted.shape and np.linalg.norm(found - wanted) < {4: 0.25, 8: 0.03}[bits] * np.linalg.norm(wanted)


def test_a_model_that_4_bits_change_too_much_is_told_from_a_broken_export(tmp_path):
    """Random weights do not hold 4 bits: the export answers as the same rounding in PyTorch does, and the refusal says so."""
    model = families.FAMILIES["qwen2_5_vl"]()
    with pytest.raises(ParityError, match=r"4 bits moves this model's logits by 0\.\d+ .*in PyTorch, too.*use int8"):
        export.export(model, tmp_path / "out", "onnx", "int4")
    assert not list(tmp_path.iterdir())
    with export.written(model, tmp_path / "out", "onnx", "int4", (), False) as (aside, _):
        loaded = inference.load_exported(aside)
        with pytest.raises(ParityError, match="away from the source's"):
            export.parity(model, loaded, 0.5)
        export.parity(export.pipeline.rounded(model, "onnx"), loaded, 0.1)


# ---- refusals


def test_export_wants_fp32_and_an_idefics(tmp_path):
    with pytest.raises(UserError, match=r"bfloat16; it starts from float32"):
        onnx_export.export_parts(quantize.bf16(tiny.house()), tmp_path)
    for other in (tiny.llava(), tiny.qwen2_5_vl(), torch.nn.Linear(2, 2)):
        with pytest.raises(UserError, match="not built like Idefics3"):
            onnx_export.export_parts(other, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_export_leaves_the_older_one(tmp_path):
    (tmp_path / "vision.onnx").write_text("older")
    broken = tiny.house()
    broken.model.text_model.norm = torch.nn.Linear(1, 1)  # the second graph cannot be traced
    with pytest.raises(Exception):  # noqa: B017 - whatever torch.export raises
        onnx_export.export_parts(broken, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vision.onnx"]
    assert (tmp_path / "vision.onnx").read_text() == "older"


def test_bad_requests(graphs, vlm, tmp_path):
    with pytest.raises(UserError, match="no graph at"):
        onnx_export.dynamic_int8(tmp_path / "none.onnx", tmp_path / "out.onnx")
    with pytest.raises(UserError, match="'int4'; expected one of uint8, int8"):
        onnx_export.dynamic_int8(graphs["vision"], tmp_path / "out.onnx", weights="int4")
    with pytest.raises(UserError, match="no calibration feeds"):
        onnx_export.static_int8(graphs["vision"], [], tmp_path / "out.onnx")
    with pytest.raises(UserError, match="'Mean'; expected one of MinMax"):
        onnx_export.static_int8(graphs["vision"], [{}], tmp_path / "out.onnx", onnx_export.StaticConfig("Mean"))
    with pytest.raises(UserError, match="no such file"):
        onnx_export.attach(vlm, {"vision": tmp_path / "none.onnx"})
    with pytest.raises(UserError, match="graphs for tower; expected vision and language"):
        onnx_export.attach(vlm, {"tower": graphs["vision"]})
    assert not list(tmp_path.iterdir())


def test_padded_pictures_and_caches_are_refused(vlm, graphs, batches):
    twin = onnx_export.attach(vlm, graphs)
    inputs = {k: v.clone() for k, v in batches[0].items()}
    size = inputs["pixel_values"].shape[-1]
    inputs["pixel_attention_mask"] = torch.ones(1, 1, size, size, dtype=torch.int64)
    inputs["pixel_attention_mask"][..., size // 2 :] = 0
    with pytest.raises(UserError, match="an image is padded"):
        twin(**inputs)
    cache = vlm(**batches[0], use_cache=True).past_key_values
    with pytest.raises(UserError, match="no KV cache"):
        twin(input_ids=batches[0]["input_ids"][:, -1:], past_key_values=cache)


def test_a_missing_runtime_names_the_extra(monkeypatch, graphs):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a))
    with pytest.raises(ImportError, match=r"mmrecipes\[deploy\]"):
        inference.onnx_session(graphs["vision"])


def test_quiet(vlm, graphs, tmp_path, capfd):
    level = logging.getLogger().level
    onnx_export.dynamic_int8(graphs["language"], tmp_path / "small.onnx")
    onnx_export.export_parts(tiny.house(), tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert logging.getLogger().level == level


def test_weights_beside_a_graph_stay_where_they_are(tmp_path):
    """A model of 3B parameters is larger than the memory that its export may take besides."""
    from mmrecipes.export.onnx import graphs

    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 32).eval()
    path = onnx_export.to_onnx(layer, {"input": torch.randn(3, 48)}, tmp_path / "graph.onnx", {})
    graphs.strip_metadata(path)  # puts them beside it
    data = path.with_name("graph.onnx.data")
    before, place = data.read_bytes(), data.stat().st_ino
    graphs.strip_metadata(path)
    assert (data.read_bytes(), data.stat().st_ino) == (before, place)
    assert {p.name for p in tmp_path.iterdir()} == {"graph.onnx", "graph.onnx.data"}
