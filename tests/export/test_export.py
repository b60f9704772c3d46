"""An exported model answers like its source, in every runtime and precision; what is broken is refused, and leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import tiny
from mmrecipes import data, export, inference, models, quantize
from mmrecipes.data import scenes
from mmrecipes.errors import ParityError, UserError

# the largest relative error of logits seen is a half or less of these
CLOSE = {"fp32": 1e-5, "int8": 0.05, "int4": 0.3}
WAYS = [(runtime, width) for runtime in ("onnx", "openvino") for width in CLOSE]


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
def loaded(vlm, way, tmp_path_factory):
    out = export.export(vlm, tmp_path_factory.mktemp("exported") / "mini", *way)
    return inference.load_exported(out)


@pytest.fixture(scope="module")
def plain(vlm, tmp_path_factory):
    """The fp32 export for ONNX Runtime, and where it is."""
    out = export.export(vlm, tmp_path_factory.mktemp("plain") / "mini")
    return inference.load_exported(out)


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


def test_weights_are_stored_once_and_shrink(vlm, loaded, way, tmp_path):
    folder, (runtime, width) = loaded.folder, way
    language = sum(p.stat().st_size for p in folder.glob("language.*"))
    weights = sum(p.numel() for p in {*vlm.model.text_model.parameters(), *vlm.lm_head.parameters()})
    bits = {"fp32": 32, "int8": 8, "int4": 4}[width]
    assert language < 1.3 * weights * bits / 8 + 500_000  # a scale a group, and the graph itself
    if runtime == "onnx":
        import onnx

        assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "whoever may read one file may read them all"
        nodes = [n.op_type for n in onnx.load(folder / "language.onnx").graph.node]
        assert nodes.count("GroupQueryAttention") == vlm.config.text_config.num_hidden_layers
        assert "Softmax" not in nodes, "attention is fused everywhere"


# ---- conversations


def torch_logits(model, inputs):
    with torch.inference_mode():
        return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits[0, -1].numpy()


def near(found, wanted):
    return abs(found - wanted).max() < 1e-3 * abs(wanted).max()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_any_number_of_pictures(vlm, plain, rows, images):
    inputs = plain.inputs([r["image"] for r in rows.select(range(images))], "How many objects are there?")
    assert near(plain.prefill(inputs), torch_logits(vlm, inputs))


@pytest.mark.parametrize("text", ["", "Is there a red circle? " * 60, "Größe? 大きい 🟥"])
def test_any_text(vlm, plain, rows, text):
    inputs = plain.inputs(rows[0]["image"], text)
    assert near(plain.prefill(inputs), torch_logits(vlm, inputs))


def test_many_at_once_are_answered_one_after_the_other(plain, rows):
    asked = [(r["image"], r["question"]) for r in rows.select(range(4))]
    alone = [plain.generate(*each) for each in asked]
    assert [plain.generate(*each) for each in reversed(asked)] == alone[::-1], "nothing stays in the cache"


def test_messages_of_several_turns(vlm, plain, rows):
    picture, first = rows[0]["image"], plain.generate(rows[0]["image"], rows[0]["question"])
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": rows[0]["question"]}]},
        {"role": "assistant", "content": [{"type": "text", "text": first}]},
        {"role": "user", "content": [{"type": "text", "text": "How many objects are there?"}]},
    ]
    inputs = plain.inputs(picture, turns)
    assert near(plain.prefill(inputs), torch_logits(vlm, inputs))
    assert plain.generate(picture, turns) == "".join(plain.stream(picture, turns)).strip()


def test_words_come_one_by_one(plain, rows):
    pieces = list(plain.stream(rows[0]["image"], "What does the blue square say?", max_new_tokens=5))
    assert "".join(pieces).strip() == plain.generate(rows[0]["image"], "What does the blue square say?", max_new_tokens=5)
    assert len(list(plain.tokens(plain.inputs(rows[0]["image"], "Is there a star?"), 1))) == 1


def test_what_does_not_fit_is_refused(plain, rows):
    with pytest.raises(UserError, match="2 pictures, and 1 place"):
        plain.generate([rows[0]["image"]] * 2, [{"role": "user", "content": [{"type": "image"}]}])
    for text in (None, 3, ["What?"], [{"role": "user"}]):
        with pytest.raises(UserError, match="expected a question"):
            plain.generate(None, text)
    with pytest.raises(UserError, match="shorten it"):
        plain.generate(None, "word " * 20_000)


def test_no_pytorch_is_needed(plain):
    code = (
        "import sys; sys.modules.update(torch=None, torchao=None)\n"  # as where they are not installed
        "from mmrecipes.exported import load_exported; from PIL import Image\n"
        f"print(load_exported({str(plain.folder)!r}).generate(Image.new('RGB', (96, 96)), 'What colour is the circle?'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_weights_rounded_before_keep_their_grid(vlm, runtime, tmp_path):
    """Half of the units in 4 bits by GPTQ, the rest in 8: the file is smaller than int8, its errors are those of int8."""
    half = {unit: 4 for i, unit in enumerate(quantize.units(vlm)) if i % 2}
    small = quantize.apply_plan(vlm, half, 32, data.calibration(8))
    whole = inference.load_exported(export.export(small, tmp_path / "int8", runtime, "int8"))
    mixed = inference.load_exported(export.export(small, tmp_path / "mixed", runtime, dict.fromkeys(export.PARTS, "mixed")))
    assert max(export.parity(small, mixed, CLOSE["int8"]).values()) <= CLOSE["int8"]
    sizes = [sum(each.manifest["bytes"].values()) for each in (mixed, whole)]
    assert sizes[0] < 0.85 * sizes[1]


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_ranges_fixed_on_pictures(vlm, rows, runtime, tmp_path):
    seen = data.calibration(12)["image"]
    out = export.export(vlm, tmp_path / "static", runtime, {"vision": "static", "language": "fp32"}, pictures=seen)
    loaded = inference.load_exported(out)
    assert max(export.parity(vlm, loaded, 0.15).values()) > 1e-5
    tower = sum(p.numel() for p in vlm.model.vision_model.parameters())
    assert sum(size for name, size in loaded.manifest["bytes"].items() if "vision" in name) < 1.5 * tower + 500_000
    for precision, pictures in (("fp32", seen), ({"vision": "static", "language": "fp32"}, [])):
        with pytest.raises(UserError, match="'static' takes some, others none"):
            export.export(vlm, tmp_path / "odd", runtime, precision, pictures=pictures)


def test_openvino_keeps_attention_whole(vlm, tmp_path):
    """Grouped heads, too; else the plugin takes it apart, and finds a word in twice the time."""
    loaded = inference.load_exported(export.export(vlm, tmp_path / "whole", "openvino"))
    executed = loaded.graphs.language.get_compiled_model().get_runtime_model().get_ops()
    kinds = [op.get_rt_info()["layerType"].astype(str) for op in executed]
    assert kinds.count("ScaledDotProductAttention") == vlm.config.text_config.num_hidden_layers
    assert "Softmax" not in kinds


def test_no_model_code_is_loaded(plain):
    code = (
        "import sys; from mmrecipes.exported import load_exported; from PIL import Image\n"
        f"print(load_exported({str(plain.folder)!r}).generate(Image.new('RGB', (96, 96)), 'What colour is the circle?'))\n"
        "assert not [m for m in sys.modules if m.startswith('transformers.models.') and '.modeling_' in m and 'auto' not in m]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


# ---- bad input


def copied(plain, tmp_path):
    import shutil

    return shutil.copytree(plain.folder, tmp_path / "copy")


@pytest.mark.parametrize("name", ["language.onnx", "language.onnx.data", "vision.onnx", "tokenizer.json", "config.json"])
def test_a_changed_file_is_refused(plain, tmp_path, name):
    folder = copied(plain, tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name}: not the file that was exported"):
        inference.load_exported(folder)
    if "onnx" in name:
        with pytest.raises(UserError, match="cannot load it"):
            inference.load_exported(folder, check=False)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        inference.load_exported(folder)


def test_a_foreign_directory_is_refused(house_vlm, plain, tmp_path):
    with pytest.raises(UserError, match=r"no export\.json"):
        inference.load_exported(house_vlm)
    with pytest.raises(UserError, match="no such directory"):
        inference.load_exported(tmp_path / "nowhere")
    folder = copied(plain, tmp_path)
    manifest = json.loads((folder / "export.json").read_text())
    for change, said in (
        ({"format": 99}, "newer mmrecipes"),
        ({"runtime": "abacus"}, "'abacus'"),
        ({"stop": None}, None),
        ({"sha256": []}, None),
        ({"precision": []}, None),
    ):
        (folder / "export.json").write_text(json.dumps({k: v for k, v in (manifest | change).items() if v is not None}))
        with pytest.raises(UserError, match=said or "not readable"):
            inference.load_exported(folder)
    (folder / "export.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        inference.load_exported(folder)


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
        (tiny.siglip(), "give a model that answers"),
        (tiny.qwen2_5_vl(), "no recipe for it yet"),
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


def test_what_is_broken_is_not_kept(tmp_path):
    out = tmp_path / "llava"
    good = tiny.llava()
    export.export(good, out)
    kept = inference.load_exported(out).manifest
    wild = tiny.llava()
    with torch.no_grad():  # one weight in each group so large that the others round to nothing, on an input that is always zero
        wild.model.language_model.norm.weight[::32] = 0
        wild.lm_head.weight[:, ::32] = 1e4
    export.export(wild, tmp_path / "whole")
    with pytest.raises(ParityError, match="it is broken, and was not kept"):
        export.export(wild, out, "onnx", "int4")
    assert inference.load_exported(out).manifest == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llava", "whole"]


def test_a_kill_leaves_nothing_that_looks_like_an_export(house_vlm, tmp_path):
    code = f"from mmrecipes import export, models; export.export(models.load({str(house_vlm)!r}), {str(tmp_path / 'out')!r})"
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    while not (tmp_path / ".out.part" / "vision.onnx").exists():  # in the middle of its work
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists()
    export.export(tiny.llava(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "what the killed run left is gone"
