"""An exported dual encoder compares images with texts as its source does; what is broken or impossible is refused."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from equality import SHAPES, drawn
from mmrecipes import evaluate, export, inference, measure, models
from mmrecipes.errors import ParityError, UserError
from mmrecipes.export.dual import resized
from mmrecipes.report import stages
from tests import families

CLOSE = {"fp32": 1e-5, "int8": 0.1, "bf16": 0.07}  # the largest error seen is a half or less of these
TEXTS = ["a red circle", "Two CATS, and a dog.", "x", "a blue star " * 60]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A family of tiny models, exported once for ONNX Runtime: (source, exported)."""
    folder = tmp_path_factory.mktemp("duals")

    @functools.cache
    def made(family):
        model = families.load(family)
        return model, inference.load_exported(export.export(model, folder / family))

    return made


@torch.inference_mode()
def source_logits(model, images, texts):
    longest = model.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "max_length": longest, "truncation": True, "return_tensors": "pt"}
    return model(**model.processor(images=images, text=texts, **options)).logits_per_image.numpy()


@pytest.mark.parametrize("family", ["clip", "siglip2"])
def test_logits_of_images_of_any_shape_and_texts_of_any_length(exports, family):
    """SigLIP 2 takes as many patches as the shape asks for (NaFlex). SigLIP is the house model, below."""
    model, loaded = exports(family)
    images = [drawn(*size) for size in SHAPES.values()]
    found, wanted = loaded.similarity(images, TEXTS), source_logits(model, images, TEXTS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert wanted.std(axis=0).min() > 1e-3 and wanted.std(axis=1).min() > 1e-3  # it tells them apart
    vectors = loaded.embed_images(images)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(loaded.embed_images(images[0]), vectors[:1], atol=1e-5)
    many = loaded.embed_texts(TEXTS * 10)  # more than one run takes
    np.testing.assert_allclose(many, np.tile(loaded.embed_texts(TEXTS), (10, 1)), atol=1e-5)


def test_a_precision_for_each_encoder(tmp_path):
    model, precisions = families.load("siglip2"), {"vision": "bf16", "language": "int8"}
    loaded = inference.load_exported(export.export(model, tmp_path / "out", "openvino", precisions))
    errors = export.parity(model, loaded, max(CLOSE.values()))
    for kind, precision in (("images", "bf16"), ("texts", "int8")):
        assert 1e-4 < errors[kind] <= CLOSE[precision]
    weights = sum(p.numel() for p in model.text_model.parameters())
    assert loaded.manifest["bytes"]["language.bin"] < 1.5 * weights


def test_retrieval_is_as_good(house_dual, tmp_path):
    """The house model finds as many captions and images as before, in int8 as many but for its interval."""
    model, seen, empty = models.load(house_dual), evaluate.gallery(n=100), ["", "a red circle"]
    wanted = evaluate.retrieval_scores(model, seen)
    for precision in ("fp32", "int8"):
        loaded = inference.load_exported(export.export(model, tmp_path / precision, "onnx", precision))
        assert max(export.parity(model, loaded, CLOSE[precision]).values()) <= CLOSE[precision]
        found = evaluate.retrieval_scores(loaded, seen)
        if precision == "fp32":
            assert found == wanted
            np.testing.assert_allclose(loaded.embed_texts(empty), evaluate.embeddings(model, texts=empty), atol=1e-5)
        for name in ("text_r1", "image_r1", "hard_negative_accuracy", "matching_accuracy"):
            share = getattr(wanted, name)
            assert share.low <= getattr(found, name).value <= share.high, name


def test_positions_are_resized_as_the_library_does():
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    grid, shapes = torch.randn(5, 5, 8), torch.tensor([[5, 5], [3, 9], [12, 2], [1, 1], [16, 4]])
    wanted = Siglip2VisionEmbeddings.resize_positional_embeddings(grid, shapes, 64)
    found = resized(grid, shapes, 64)
    for i, (height, width) in enumerate(shapes.tolist()):  # behind them is padding, which attention does not see
        torch.testing.assert_close(found[i, : height * width], wanted[i, : height * width], atol=1e-5, rtol=0)


def test_no_pytorch_is_needed(exports):
    code = (
        "import sys; sys.modules.update(torch=None, torchao=None)\n"  # as where they are not installed
        "from mmrecipes.inference import load_exported; from PIL import Image\n"
        f"print(load_exported({str(exports('siglip2')[1].folder)!r}).similarity(Image.new('RGB', (96, 40)), 'a circle'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def test_what_cannot_be_is_refused(exports, tmp_path):
    model, loaded = exports("clip")
    for arguments, said in (
        (("executorch",), "has no recipe for that; use onnx or openvino"),
        (("onnx", "int4"), "expected one of fp32, int8"),
        (("onnx", "bf16"), "expected one of fp32, int8"),
    ):
        with pytest.raises(UserError, match=said):
            export.export(model, tmp_path / "out", *arguments)
    bare = tiny.clip()
    for odd, said in ((bare, "load it with models.load"), (tiny.siglip().to(torch.bfloat16), "starts from float32")):
        with pytest.raises(UserError, match=said):
            export.export(odd, tmp_path / "out")
    with pytest.raises(UserError, match="nothing to embed"):
        loaded.embed_texts([])
    with pytest.raises(UserError, match="does not answer questions"):
        measure.profile_exported(loaded.folder, Image.new("RGB", (32, 32)), "What?")
    with pytest.raises(UserError, match="has no stages"):
        stages.load_side(str(loaded.folder))
    assert not any(tmp_path.iterdir())


def test_a_broken_manifest_or_model_is_told(exports, tmp_path):
    loaded = exports("clip")[1]
    manifest = json.loads((loaded.folder / inference.MANIFEST).read_text())
    del manifest["logit_scale"]
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / inference.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"not readable .'logit_scale'"):
        inference.load_exported(tmp_path / "torn")
    broken = tiny.clip_128()
    with torch.no_grad():
        broken.text_projection.weight.fill_(torch.nan)
    with pytest.raises(ParityError, match="not finite"):
        export.export(broken, tmp_path / "out")
    other = families.load("clip")
    with torch.no_grad():
        other.text_projection.weight.mul_(torch.linspace(0, 2, 32)[:, None])
    with pytest.raises(ParityError, match="it is broken, and was not kept"):
        export.parity(other, loaded, export.TOLERANCE["int8"])
    assert [p.name for p in tmp_path.iterdir()] == ["torn"]
