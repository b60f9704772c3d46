"""`mmrecipes compare`: the first stage at which two versions of a model differ, whatever they are kept in."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrecipes import cli, export
from mmrecipes.data import scenes
from mmrecipes.report import stages
from tests import families, optimum_files

TRACED = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def llava():
    return str(families.family_dir("llava"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {p: str(export.export(families.load("llava"), folder / p, "onnx", p)) for p in ("fp32", "int8")}


@pytest.fixture
def compare(monkeypatch, capsys):
    """The command: its exit code, and what it printed (with --json, the object)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmrecipes", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        shown = json.loads(printed.out) if "--json" in arguments and printed.out else printed.out
        return int(ended.value.code or 0), shown or printed.err

    return run


def verdicts(found):
    return {row["stage"]: row["verdict"] for row in found["stages"]}


def changed(tmp_path, part):
    """A copy of the tiny LLaVA with the weights of one part a tenth larger."""
    out = shutil.copytree(families.family_dir("llava"), tmp_path / part)
    weights = load_file(out / "model.safetensors")
    names = [name for name in weights if part in name and weights[name].ndim > 1]
    assert names
    save_file({k: 1.1 * v if k in names else v for k, v in weights.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_checkpoint_and_its_export_are_equal(compare, llava, exports):
    code, found = compare(llava, exports["fp32"], "--json")
    assert code == 0 and found["first"] is None
    assert verdicts(found) == dict.fromkeys(stages.STAGES, "equal") | {"vision encoder": "not compared"}
    assert found["answers"]["value"] == 1 and found["answers"]["n"] == 5 and found["answers"]["low"] < 0.6
    assert all(len(row["by_conversation"]) == 5 for row in found["stages"])
    code, shown = compare(exports["fp32"], llava, "-n", 2)
    assert code == 0 and "Nothing differs by more than 0.001" in shown and "2 of 2 are the same" in shown


def test_an_int8_export_differs_from_where_it_is_rounded(compare, llava, exports):
    code, found = compare(llava, exports["int8"], "--json")
    assert code == 1 and found["first"] == "connector" and verdicts(found)["preprocessing"] == "equal"
    assert 1e-3 < found["stages"][2]["difference"] < 0.25
    code, found = compare(llava, exports["int8"], "--json", "--tolerance", 0.25)
    assert verdicts(found)["first logits"] == "close" and found["first"] in (None, "answers")
    code, shown = compare(llava, exports["int8"], "-n", 1)
    assert code == 1 and "connector, or the vision encoder before it, which is not shown by both." in " ".join(shown.split())


def test_other_means_and_deviations_are_preprocessing_and_nothing_else(compare, llava, tmp_path):
    out = shutil.copytree(llava, tmp_path / "copy")
    settings = json.loads((out / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (out / "preprocessor_config.json").write_text(json.dumps(settings))
    code, found = compare(llava, out, "--json")
    assert code == 1 and found["first"] == "preprocessing" and "pixel_values" in found["stages"][0]["note"]
    assert set(list(verdicts(found).values())[1:]) == {"equal"}, "both were given the same input"


def test_another_template_is_preprocessing(compare, llava, tmp_path):
    out = shutil.copytree(llava, tmp_path / "copy")
    (out / "chat_template.jinja").write_text((out / "chat_template.jinja").read_text().replace("ASSISTANT:", "ASSISTANT: "))
    code, found = compare(llava, out, "--json")
    assert code == 1 and found["first"] == "preprocessing" and "input_ids" in found["stages"][0]["note"]
    assert found["stages"][0]["difference"] is None, "JSON has no infinity"


@pytest.mark.parametrize(
    ("part", "stage"),
    [("vision_tower", "vision encoder"), ("multi_modal_projector", "connector"), ("lm_head", "first logits")],
)
def test_the_part_whose_weights_changed_is_named(compare, llava, tmp_path, part, stage):
    code, shown = compare(llava, changed(tmp_path, part))
    assert code == 1 and f"The first stage that differs is {stage}." in shown
    code, found = compare(llava, tmp_path / part, "--json")
    before = stages.STAGES[: stages.STAGES.index(stage)]
    assert code == 1 and found["first"] == stage and {verdicts(found)[name] for name in before} == {"equal"}


def test_rules_of_generation_change_answers_alone(compare, llava, tmp_path):
    out = shutil.copytree(llava, tmp_path / "copy")
    rules = json.loads((out / "generation_config.json").read_text()) | {"repetition_penalty": 5.0}
    (out / "generation_config.json").write_text(json.dumps(rules))
    code, found = compare(llava, out, "--json")
    assert code == 1 and found["first"] == "answers" and found["tokens"]["same"] == found["tokens"]["n"]
    assert compare(out, out)[0] == 0


def test_images_of_ones_own(compare, llava, tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(3):
        scenes.render(scenes.make_scene(i), 100 + 40 * i).save(tmp_path / "mine" / f"{i}.png")
    code, found = compare(llava, llava, "--images", tmp_path / "mine", "--question", "Why?", "--json", "-n", 2)
    assert code == 0 and found["answers"]["n"] == 2 and set(verdicts(found).values()) == {"equal"}
    assert len(stages.conversations(None, 8)) == 8


@torch.inference_mode()
def test_visual_tokens_are_those_of_the_library(llava):
    side, model = stages.load_side(llava), families.load("llava")
    inputs = side.prepare(stages.conversations(None, 1)[0], "What is it?")
    wanted = model.model.get_image_features(torch.from_numpy(inputs["pixel_values"]), return_dict=True).pooler_output
    assert stages.distance(side.run(inputs, None).visual, torch.cat(list(wanted)).numpy()) < 1e-6


def test_positions_in_three_axes_and_windows(compare, tmp_path):
    out = export.export(families.load("qwen2_5_vl"), tmp_path / "export", "openvino")
    code, found = compare(families.family_dir("qwen2_5_vl"), out, "--json")
    assert code == 0 and verdicts(found)["connector"] == verdicts(found)["decode steps"] == "equal"


# ---- the files of optimum and transformers.js


@TRACED
@pytest.mark.parametrize("name", ["llava", "smolvlm"])
@pytest.mark.parametrize("layout", ["optimum", "transformers.js", "optimum-intel"])
def test_files_of_optimum(compare, tmp_path, name, layout):
    model, out = families.load(name), tmp_path / "theirs"
    if layout == "optimum-intel":
        optimum_files.write_openvino(model, out)
    else:
        optimum_files.write_onnx(model, out, "onnx" if layout == "transformers.js" else "")
    code, found = compare(families.family_dir(name), out, "--json")
    assert code == 0, found
    assert verdicts(found) == dict.fromkeys(stages.STAGES, "equal") | {"vision encoder": "not compared"}


@TRACED
def test_a_decoder_that_loses_count_differs_in_the_second_token(compare, llava, tmp_path):
    out = optimum_files.write_onnx(families.load("llava"), tmp_path / "theirs", decoder=optimum_files.Restarting)
    code, found = compare(llava, out, "--json")
    assert code == 1 and found["first"] == "decode steps" and verdicts(found)["first logits"] == "equal"


@TRACED
def test_logits_that_are_not_finite_differ(compare, llava, tmp_path):
    model = families.load("llava")
    with torch.no_grad():
        model.lm_head.weight[:] = torch.inf
    code, found = compare(llava, optimum_files.write_onnx(model, tmp_path / "broken"), "--json")
    assert code == 1 and found["first"] == "first logits" and verdicts(found)["connector"] == "equal"
    code, shown = compare(tmp_path / "broken", llava)
    assert code == 1 and "not finite" in shown and len(shown.splitlines()) == 1


def test_what_cannot_be_compared_is_one_line(compare, llava, tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "onnx").mkdir(parents=True)
    (theirs / "onnx" / "vision_encoder.onnx").write_bytes(b"")
    merged = tmp_path / "merged"
    shutil.copytree(families.family_dir("qwen2_5_vl"), merged, ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("vision_embeddings", "text_embeddings", "language"):
        (merged / f"openvino_{part}_model.xml").write_text("")
    torn = tmp_path / "torn"
    shutil.copytree(llava, torn, ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        (torn / f"{part}.onnx").write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    for other, said in (
        (tmp_path / "nowhere", "no model at"),
        (tmp_path / "empty", "the directory is empty"),
        (theirs, "without embed_tokens.onnx"),
        (merged, "a qwen2_5_vl in optimum's layout"),
        (torn, "cannot load it"),
        (families.family_dir("clip"), "compares images with texts"),
        (families.family_dir("qwen2_5_vl"), "cannot take the same inputs"),
    ):
        code, shown = compare(llava, other)
        assert code == 1 and said in shown and len(shown.strip().splitlines()) == 1, shown
