"""An exported model answers like its source, in every runtime and precision; what is broken is refused, and leaves nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import tiny
from mmrecipes import data, export, inference, models, quantize
from mmrecipes.data import scenes
from mmrecipes.errors import ParityError, UserError
from mmrecipes.export import fastest
from mmrecipes.inference import backends

# the largest relative error of logits seen is a half or less of these
CLOSE = {"fp32": 1e-5, "int8": 0.05, "int4": 0.3}
WAYS = [(runtime, precision) for runtime in ("onnx", "openvino") for precision in CLOSE]


@pytest.fixture(scope="module")
def vlm(house_vlm):
    return models.load(house_vlm)


@pytest.fixture(scope="module")
def rows():
    return data.test_split(21)


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def way(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(house_exports, way):
    return inference.load_exported(house_exports(*way))


@pytest.fixture(scope="module")
def half_rounded(vlm):
    """Half of the units in 4 bits by GPTQ."""
    half = {unit: 4 for i, unit in enumerate(quantize.units(vlm)) if i % 2}
    return quantize.apply_plan(vlm, half, 32, data.calibration(8))


def test_answers_like_its_source(vlm, loaded, way, rows):
    assert max(export.parity(vlm, loaded, CLOSE[way[1]]).values()) <= CLOSE[way[1]]
    same = [loaded.generate(r["image"], r["question"]) == models.ask(vlm, r["image"], r["question"]) for r in rows]
    assert sum(same) >= len(same) - (0 if way[1] == "fp32" else 2)


def test_a_foreign_model(way, tmp_path):
    llava = tiny.llava()
    loaded = inference.load_exported(export.export(llava, tmp_path / "llava", *way))
    assert max(export.parity(llava, loaded, CLOSE[way[1]]).values()) <= CLOSE[way[1]]
    if way[1] == "fp32":
        picture = scenes.render(scenes.make_scene(3), 64)
        assert loaded.generate(picture, "What?", 6) == models.ask(llava, picture, "What?", 6)


def test_a_prompt_in_two_pieces_gives_the_logits_of_the_whole(loaded, way, rows):
    """A piece sees all that came before it, and nothing behind itself."""
    inputs = loaded.inputs(rows[0]["image"], rows[0]["question"])
    whole = loaded.prefill(inputs)
    cut = inputs["input_ids"].shape[1] - 5
    loaded.prefill({**inputs, "input_ids": inputs["input_ids"][:, :cut]})
    pieces = loaded.graphs.step(inputs["input_ids"][:, cut:])
    assert np.linalg.norm(pieces - whole) <= CLOSE[way[1]] * np.linalg.norm(whole)


def test_weights_are_stored_once_and_shrink(vlm, loaded, way, tmp_path):
    folder, (runtime, precision) = loaded.folder, way
    language = sum(p.stat().st_size for p in folder.glob("language.*"))
    weights = sum(p.numel() for p in {*vlm.model.text_model.parameters(), *vlm.lm_head.parameters()})
    bits = {"fp32": 32, "int8": 8, "int4": 4}[precision]
    assert language < 1.3 * weights * bits / 8 + 500_000  # a scale a group, and the graph itself
    if runtime == "onnx":
        import onnx

        assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "whoever may read one file may read them all"
        nodes = [n.op_type for n in onnx.load(folder / "language.onnx").graph.node]
        assert nodes.count("GroupQueryAttention") == vlm.config.text_config.num_hidden_layers
        assert "Softmax" not in nodes, "attention is fused everywhere"


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_weights_rounded_before_keep_their_grid(half_rounded, house_exports, runtime, tmp_path):
    """Half of the units in 4 bits, the rest in 8: the file is smaller than the model's int8, its errors are those of int8."""
    mixed = inference.load_exported(export.export(half_rounded, tmp_path / "mixed", runtime, "mixed"))
    assert max(export.parity(half_rounded, mixed, CLOSE["int8"]).values()) <= CLOSE["int8"]
    int8 = inference.load_exported(house_exports(runtime, "int8"))
    sizes = [sum(each.manifest["bytes"].values()) for each in (mixed, int8)]
    assert sizes[0] < 0.85 * sizes[1]


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_ranges_fixed_on_images(vlm, rows, runtime, tmp_path):
    seen = data.calibration(12)["image"]
    out = export.export(vlm, tmp_path / "static", runtime, {"vision": "static", "language": "fp32"}, images=seen)
    loaded = inference.load_exported(out)
    assert max(export.parity(vlm, loaded, 0.15).values()) > 1e-5
    weights = sum(p.numel() for p in vlm.model.vision_model.parameters())
    assert sum(size for name, size in loaded.manifest["bytes"].items() if "vision" in name) < 1.5 * weights + 500_000
    for precision, images in (("fp32", seen), ({"vision": "static", "language": "fp32"}, [])):
        with pytest.raises(UserError, match="'static' takes some, others none"):
            export.export(vlm, tmp_path / "odd", runtime, precision, images=images)


def test_each_part_in_a_runtime_of_its_own(vlm, tmp_path):
    where = {"vision": "openvino", "language": "onnx"}
    out = export.export(vlm, tmp_path / "both", where, {"vision": "fp32", "language": "int8"})
    assert {p.stem for p in out.glob("*.onnx")} == {"language"} and {p.stem for p in out.glob("*.xml")} == {"vision"}
    loaded = inference.load_exported(out)
    assert loaded.manifest["runtime"] == where
    assert export.parity(vlm, loaded, CLOSE["int8"])
    for wrong, why in (({"vision": "openvino", "language": "executorch"}, "onnx and openvino"), ({"vision": "x"}, "'x'")):
        with pytest.raises(UserError, match=why):
            export.export(vlm, tmp_path / "odd", wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["both"]


def test_the_fastest_vision_encoder_is_put_in(vlm, house_exports, tmp_path):
    """Which one that is depends on the machine; the export answers as before with any."""
    seen = data.calibration(12)["image"][:]
    for own in ("onnx", "openvino"):
        out = shutil.copytree(house_exports(own, "int8"), tmp_path / own)
        tried = fastest.choose_vision_(vlm, out, seen, repeats=2)
        assert (tried[0]["runtime"], tried[0]["precision"]) == (own, "int8") and len(tried) == 3
        assert sum(row["kept"] for row in tried) == 1
        assert all(0 < row["error"] < 0.25 for row in tried)
        loaded, kept = inference.load_exported(out), next(row for row in tried if row["kept"])
        assert loaded.manifest["precision"] == {"vision": kept["precision"], "language": "int8"}
        assert backends.runtimes(loaded.manifest["runtime"]) == {"vision": kept["runtime"], "language": own}
        assert export.parity(vlm, loaded, 0.25)
        faster = [row for row in tried if row["ms"]["median"] < 0.95 * tried[0]["ms"]["median"]]
        assert kept == min(faster or tried[:1], key=lambda row: row["ms"]["median"])
    with pytest.raises(UserError, match="no images"):
        fastest.choose_vision_(vlm, out, [])


def test_a_vision_encoder_that_cannot_be_made_is_left_out(vlm, house_exports, tmp_path, monkeypatch):
    """The last of a long job's steps must not lose the rest."""
    out = shutil.copytree(house_exports("onnx", "int8"), tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(fastest, "CANDIDATES", (("onnx", "a precision that its writer does not know"),))
    monkeypatch.setattr(fastest.wrappers, "vision_graph", _second_time_broken(fastest.wrappers.vision_graph))
    tried = fastest.choose_vision_(vlm, out, data.calibration(1)["image"][:], repeats=1)
    assert [row["kept"] for row in tried] == [True]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def _second_time_broken(real):
    calls = []

    def made(model):
        calls.append(model)
        if len(calls) > 1:
            raise RuntimeError("this encoder cannot be traced")
        return real(model)

    return made


def test_openvino_keeps_attention_whole(vlm, house_exports):
    """Grouped heads, too; else the plugin takes it apart, and a token takes twice the time."""
    loaded = inference.load_exported(house_exports("openvino", "fp32"))
    executed = loaded.graphs.language.get_compiled_model().get_runtime_model().get_ops()
    kinds = [op.get_rt_info()["layerType"].astype(str) for op in executed]
    assert kinds.count("ScaledDotProductAttention") == vlm.config.text_config.num_hidden_layers
    assert "Softmax" not in kinds


# ---- refusals


def test_bad_requests(vlm, tmp_path):
    for arguments, said in (
        (("abacus",), "expected one of onnx, openvino, executorch"),
        (("onnx", "int3"), "expected one of fp32, int8"),
        (("onnx", {"vision": "int8"}), "precision of language"),
    ):
        with pytest.raises(UserError, match=said):
            export.export(vlm, tmp_path / "out", *arguments)
    mute = tiny.llava()
    mute.processor.chat_template = None
    for model, said in (
        (mute, "chat template"),
        (tiny.blip2(), "there is no recipe for Blip2ForConditionalGeneration yet: its Q-Former stands between"),
    ):
        with pytest.raises(UserError, match=said):
            export.export(model, tmp_path / "out")
    half = tiny.llava().to(torch.bfloat16)
    with pytest.raises(UserError, match="starts from float32"):
        export.export(half, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="left alone"):
        export.export(tiny.llava(), tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_a_source_that_is_quantized_already_is_refused(vlm, tmp_path):
    quantize.write_nf4(vlm, quantize.can_nf4(vlm), tmp_path / "nf4")
    for load in (quantize.load_nf4, models.load):
        with pytest.raises(UserError, match=r"already quantized .bitsandbytes.*float checkpoint"):
            export.export(load(tmp_path / "nf4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_broken_is_not_kept(house_exports, tmp_path):
    out = shutil.copytree(house_exports("onnx", "fp32"), tmp_path / "older")
    kept = inference.load_exported(out).manifest
    wild = tiny.llava()
    with torch.no_grad():  # one input in each group so large that the others round to nothing, and which no weight reads
        wild.model.language_model.norm.weight[::32] = 1e4
        wild.lm_head.weight[:, ::32] = 0
    export.export(wild, tmp_path / "whole")
    with pytest.raises(ParityError, match="it is broken, and was not kept"):
        export.export(wild, out, "onnx", "int4")
    assert inference.load_exported(out).manifest == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["older", "whole"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_what_is_stopped_leaves_nothing_that_looks_like_an_export(foreign_vlm, tmp_path, stop):
    code = f"""
from mmrecipes import export, interrupt, models
with interrupt.ends_the_process():  # as each command
    export.export(models.load({str(foreign_vlm)!r}), {str(tmp_path / "out")!r})
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests started in the background ignore it
    )
    while not (tmp_path / ".out.part" / "vision.onnx").exists():  # in the middle of its work
        assert child.poll() is None, "it ended before it could be stopped"
        time.sleep(0.05)
    child.send_signal(stop)
    assert child.wait() != 0
    if stop == signal.SIGINT:
        assert child.returncode == 130 and list(tmp_path.iterdir()) == [], "Ctrl-C cleans up"
        return
    assert not (tmp_path / "out").exists()
    export.export(tiny.llava(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "what the killed run left is gone"
