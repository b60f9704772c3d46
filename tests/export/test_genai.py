"""A model exported for OpenVINO GenAI answers as its source does, alone and with other requests; what it cannot do is refused."""

import json
import shutil

import pytest

from mmrecipes import data, export, inference, models
from mmrecipes.errors import ParityError, UserError
from mmrecipes.export import genai, pipeline
from mmrecipes.inference.genai import load_genai
from tests import equality, families


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The tiny LLaVA, exported in fp32: the directory, to read."""
    return export.export(families.load("llava"), tmp_path_factory.mktemp("genai") / "llava", "openvino-genai")


def test_the_house_model_answers_as_before(house_vlm, house_exports):
    """14 questions at once: the answers of PyTorch, and more than one request in a step."""
    vlm, rows = models.load(house_vlm), data.test_split(14)
    loaded = load_genai(house_exports("openvino-genai", "fp32"), threads=1)
    wanted = [models.ask(vlm, r["image"], r["question"]) for r in rows]
    assert loaded.generate_batch([(r["image"], r["question"]) for r in rows]) == wanted
    assert loaded.together > 1
    assert len(set(wanted)) > 5
    assert loaded.generate(rows[0]["image"], rows[0]["question"]) == wanted[0]


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_the_tokens_of_the_source(name, llava, tmp_path):
    """Five shapes (of SmolVLM: in tiles), two images, none, two turns: the tokens of `generate`, together and alone."""
    model, cases = families.load(name), equality.cases()
    folder = llava if name == "llava" else export.export(model, tmp_path / name, "openvino-genai")
    loaded, wanted = load_genai(folder, threads=1), [equality.source_answer(model, case, 8)[0] for case in cases]
    asked = [(case.images or None, case.messages) for case in cases]
    assert len({tuple(tokens) for tokens in wanted}) > 5
    assert loaded.tokens(asked, 8) == wanted
    assert loaded.together == len(cases)
    assert [loaded.tokens([each], 8)[0] for each in asked] == wanted


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.35), ("int4", 0.25)])
def test_fewer_bits(precision, share, llava, tmp_path):
    """Kept only if its pipeline answers as its graphs do, which `export` has seen; the language model's file gets small."""
    small = export.export(families.load("llava"), tmp_path / "small", "openvino-genai", precision)
    assert load_genai(small, threads=1).generate(equality.drawn(96, 48), "What is this?", 4)
    sizes = [(folder / "openvino_language_model.bin").stat().st_size for folder in (small, llava)]
    assert sizes[0] < share * sizes[1]


def test_a_pipeline_that_sees_other_images_than_the_graphs_is_noticed(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "other")
    path = tmp_path / "other" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0, 0, 0], "image_std": [9, 9, 9]}))
    loaded = inference.load_exported(llava)
    genai.check_pipeline(llava, loaded, pipeline.shown())
    with pytest.raises(ParityError, match="answers otherwise"):
        genai.check_pipeline(tmp_path / "other", loaded, pipeline.shown())


REFUSED = {"qwen2_5_vl": "one size", "llava_next": "one size", "gemma3": "see each other", "paligemma": "see each other"}
REFUSED |= {"internvl": "without text", "pixtral": "one size", "minicpmv4_6": "one size"}


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_families_that_do_not_fit_are_refused_before_any_work(name, why, tmp_path):
    with pytest.raises(UserError, match=rf"\(\w+\) cannot be exported for openvino-genai: .*{why}.*; use openvino"):
        export.export(families.load(name), tmp_path / "out", "openvino-genai")
    assert not list(tmp_path.iterdir())


def test_what_else_is_refused(llava, tmp_path):
    model = families.load("llava")
    with pytest.raises(UserError, match="puts requests together by itself"):
        export.export(model, tmp_path / "out", "openvino-genai", batches=True)
    with pytest.raises(UserError, match="two runtimes are for"):
        export.export(model, tmp_path / "out", {"vision": "openvino", "language": "openvino-genai"})
    with pytest.raises(UserError, match="precision of vision for openvino-genai: 'static'"):
        export.export(model, tmp_path / "out", "openvino-genai", {"vision": "static", "language": "int8"})
    plain = model.generation_config.repetition_penalty
    try:
        model.generation_config.repetition_penalty = 1.4
        with pytest.raises(UserError, match="repetition_penalty, which GenAI applies to no prompt with images"):
            export.export(model, tmp_path / "out", "openvino-genai")
    finally:
        model.generation_config.repetition_penalty = plain
    assert not list(tmp_path.iterdir())
    loaded = load_genai(llava, threads=1)
    with pytest.raises(UserError, match="shorten it"):
        loaded.generate(None, "word " * 3000)
    with pytest.raises(UserError, match="stands for an image"):
        loaded.generate(equality.drawn(64, 64), "What is <image>?")
    loaded.processor.chat_template = "<image><image>What?"
    with pytest.raises(UserError, match="two images without text between them"):
        loaded.generate([equality.drawn(64, 64)] * 2, "What?")


def test_only_its_own_directories_are_loaded(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "other")
    path = tmp_path / "other" / inference.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runtime": "openvino"}))
    with pytest.raises(UserError, match="exported for openvino; use load_exported"):
        load_genai(tmp_path / "other")
    (tmp_path / "other" / "openvino_language_model.bin").write_bytes(b"")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runtime": "openvino-genai"}))
    with pytest.raises(UserError, match="cannot load it"):
        load_genai(tmp_path / "other")
