"""An exported model answers conversations as its source does, without PyTorch; damaged and foreign directories are refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from mmrecipes import data, inference, models
from mmrecipes.errors import UserError


@pytest.fixture(scope="module")
def vlm(house_vlm):
    return models.load(house_vlm)


@pytest.fixture(scope="module")
def rows():
    return data.test_split(21)


@pytest.fixture(scope="module")
def plain(house_exports):
    """The fp32 export for ONNX Runtime."""
    return inference.load_exported(house_exports("onnx", "fp32"))


# ---- conversations


def torch_logits(model, inputs):
    with torch.inference_mode():
        return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits[0, -1].numpy()


def near(found, wanted):
    return abs(found - wanted).max() < 1e-3 * abs(wanted).max()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_any_number_of_images(vlm, plain, rows, images):
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


def test_tokens_come_one_by_one(plain, rows):
    pieces = list(plain.stream(rows[0]["image"], "What does the blue square say?", max_new_tokens=5))
    assert "".join(pieces).strip() == plain.generate(rows[0]["image"], "What does the blue square say?", max_new_tokens=5)
    assert len(list(plain.tokens(plain.inputs(rows[0]["image"], "Is there a star?"), 1))) == 1


def test_what_does_not_fit_is_refused(plain, rows):
    with pytest.raises(UserError, match="2 images, and 1 place"):
        plain.generate([rows[0]["image"]] * 2, [{"role": "user", "content": [{"type": "image"}]}])
    for text in (None, 3, ["What?"], [{"role": "user"}]):
        with pytest.raises(UserError, match="expected a question"):
            plain.generate(None, text)
    with pytest.raises(UserError, match="shorten it"):
        plain.generate(None, "word " * 20_000)


def test_no_pytorch_is_needed(plain):
    code = (
        "import sys; sys.modules.update(torch=None, torchao=None)\n"  # as where they are not installed
        "from mmrecipes.inference import load_exported; from PIL import Image\n"
        f"print(load_exported({str(plain.folder)!r}).generate(Image.new('RGB', (96, 96)), 'What colour is the circle?'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def test_no_model_code_is_loaded(plain):
    code = (
        "import sys; from mmrecipes.inference import load_exported; from PIL import Image\n"
        f"print(load_exported({str(plain.folder)!r}).generate(Image.new('RGB', (96, 96)), 'What colour is the circle?'))\n"
        "assert not [m for m in sys.modules if m.startswith('transformers.models.') and '.modeling_' in m and 'auto' not in m]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


# ---- bad input


def copied(plain, tmp_path):
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
    with pytest.raises(UserError, match=r"no mmrecipes_export\.json"):
        inference.load_exported(house_vlm)
    with pytest.raises(UserError, match="no such directory"):
        inference.load_exported(tmp_path / "nowhere")
    folder = copied(plain, tmp_path)
    manifest = json.loads((folder / inference.MANIFEST).read_text())
    for change, said in (
        ({"format": 99}, "newer mmrecipes"),
        ({"runtime": "abacus"}, "'abacus'"),
        ({"eos_token_ids": None}, None),
        ({"sha256": []}, None),
        ({"precision": []}, None),
    ):
        (folder / inference.MANIFEST).write_text(json.dumps({k: v for k, v in (manifest | change).items() if v is not None}))
        with pytest.raises(UserError, match=said or "not readable"):
            inference.load_exported(folder)
    (folder / inference.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="not readable"):
        inference.load_exported(folder)


def test_an_export_of_the_first_edition_loads(plain, rows, tmp_path):
    folder = copied(plain, tmp_path)
    (folder / inference.MANIFEST).unlink()
    manifest = plain.manifest | {"format": 1}
    manifest["stop"], manifest["longest"] = manifest.pop("eos_token_ids"), manifest.pop("max_length")
    (folder / "export.json").write_text(json.dumps(manifest))
    loaded = inference.load_exported(folder)
    assert loaded.manifest == plain.manifest | {"format": 1}
    assert loaded.generate(rows[0]["image"], rows[0]["question"]) == plain.generate(rows[0]["image"], rows[0]["question"])
    (folder / "vision.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"vision\.onnx: not the file"):
        inference.load_exported(folder)


def test_an_export_by_transformers_is_refused(plain, tmp_path):
    from transformers.exporters.base import ExportedModel

    ExportedModel({}, "onnx").save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="written by transformers' own exporter"):
        inference.load_exported(tmp_path / "theirs")
    ours = copied(plain, tmp_path)
    ExportedModel({}, "onnx").save_pretrained(ours)  # both lie side by side
    assert inference.load_exported(ours).manifest == plain.manifest


def test_a_missing_runtime_names_the_extra(plain, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a))
    with pytest.raises(ImportError, match=r"mmrecipes\[deploy\]"):
        inference.load_exported(plain.folder)
