"""The command line: the tour on house, foreign and own pictures, and bad input, one line each."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import programs
from mmrecipes import models
from mmrecipes.data import families, scenes

HOUSE = models.data_dir() / "models" / "mini-vlm"


def run(*args, cwd):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "150"}
    return programs.run(["-m", "mmrecipes.cli", *args], cwd, env)


def test_importing_the_package_loads_no_large_library():
    code = "import sys, mmrecipes; print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_tour_shows_all_and_writes_a_page_that_stands_alone(tmp_path):
    done = run("tour", "--n", 70, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("million parameters", "prefill", "int8 dynamic", "4-bit exported", "2-bit simulated", "TTFT", "tour.html"):
        assert word in done.stdout
    page = (tmp_path / "tour.html").read_text()
    assert page.count("data:image/png;base64,") >= 8 and "<table" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page must not need other files"
    assert [p.name for p in tmp_path.iterdir()] == ["tour.html"]


def test_the_tour_on_ones_own_pictures_measures_agreement(tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(5):
        scenes.render(scenes.make_scene(i), 200 + i).save(tmp_path / "mine" / f"{i}.png")
    done = run("tour", "--images", "mine", "--question", "How many objects are there?", "--out", "sub/my.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "agreement" in done.stdout and "accuracy" not in done.stdout
    assert "How many objects are there?" in (tmp_path / "sub" / "my.html").read_text()


def test_the_tour_takes_a_foreign_model(tmp_path):
    import tiny

    tiny.save(tiny.llava(), tmp_path / "llava")
    done = run("tour", "--model", tmp_path / "llava", "--n", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "int8 dynamic" in done.stdout and (tmp_path / "tour.html").exists()


def test_the_doctor_prints_parts_verdicts_and_what_stands_in_the_way(tmp_path):
    import tiny

    tiny.save(tiny.llava(), tmp_path / "llava")
    for model in ("mini-vlm", tmp_path / "llava"):
        done = run("doctor", model, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in ("language", "dynamic int8", "decode", "pay"))
    check(run("doctor", "nowhere", cwd=tmp_path), tmp_path, "nowhere")
    check(run("doctor", "--image", "nothing.png", cwd=tmp_path), tmp_path, "nothing.png")


def test_evaluate_tells_how_well_pictures_and_captions_find_each_other(tmp_path):
    done = run("evaluate", "mini-siglip", "--n", 100, "--out", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["text_r1"]["n"] == 100 and found["environment"]["torch"]
    assert {"text_r1", "image_r1", "hard_negative_accuracy", "matching_accuracy", "zero-shot colour"} <= {
        k for k in found if k in done.stdout
    }
    check(run("evaluate", "mini-siglip", "--n", 150, cwd=tmp_path), tmp_path, "150", "100")


def test_evaluate_prints_families_with_floors(tmp_path):
    done = run("evaluate", "mini-vlm", "--n", 70, "--out", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f in done.stdout for f in families.FAMILIES) and "floor" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["overall"]["n"] == 70


def bad_model(kind, folder):
    """A copy of the house model with one thing wrong."""
    shutil.copytree(HOUSE, folder)
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif kind == "corrupted":
        weights.write_bytes(b"\xff" * 4096 + weights.read_bytes()[4096:])
    elif kind == "wrong architecture":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    elif kind == "not a VLM":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    elif kind == "other sizes":
        config["text_config"]["hidden_size"] = 512
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    return folder


def check(done, folder, *words):
    """One line on stderr, with `words`; exit code not 0; nothing written."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert not list(folder.glob("**/*.html")) and not list(folder.glob("**/*.part"))


@pytest.mark.parametrize("kind", ["truncated", "corrupted", "wrong architecture", "not a VLM", "other sizes", "no tokenizer"])
def test_a_bad_model_directory_is_one_line(kind, tmp_path):
    bad_model(kind, tmp_path / "broken")
    check(run("tour", "--model", "broken", cwd=tmp_path), tmp_path, "broken")


def test_missing_and_empty_model_and_hub_id_offline(tmp_path):
    (tmp_path / "empty").mkdir()
    check(run("tour", "--model", "nowhere", cwd=tmp_path), tmp_path, "nowhere")
    check(run("tour", "--model", "empty", cwd=tmp_path), tmp_path, "empty")
    check(run("tour", "--model", "HuggingFaceTB/SmolVLM-256M-Instruct", cwd=tmp_path), tmp_path, "hf download", "SmolVLM-256M")


@pytest.mark.parametrize("kind", ["missing", "no pictures", "text", "truncated", "huge"])
def test_bad_pictures_are_one_line(kind, tmp_path):
    folder = tmp_path / "mine"
    if kind != "missing":
        folder.mkdir()
    bad = folder / "bad.png"
    if kind == "text":
        bad.write_text("not a picture")
    elif kind == "truncated":
        Image.effect_noise((200, 200), 80).save(bad)
        bad.write_bytes(bad.read_bytes()[:2000])
    elif kind == "huge":  # 30,000 x 30,000, as its header says
        import struct
        import zlib

        def chunk(name, body):
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

        header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
        bad.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    check(
        run("tour", "--images", "mine", "--question", "What?", cwd=tmp_path), tmp_path, "mine" if not bad.exists() else "bad.png"
    )


def test_debug_shows_where_an_error_comes_from(tmp_path):
    for line in (["--debug", "doctor", "nowhere"], ["doctor", "nowhere", "--debug"]):
        done = run(*line, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: no model at 'nowhere'")
    assert "--debug" in run("--help", cwd=tmp_path).stdout


def test_what_nobody_foresaw_is_one_line(tmp_path):
    folder = bad_model("as it is", tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": 7}))
    check(run("doctor", "odd", cwd=tmp_path), tmp_path, "odd")


def test_pictures_and_question_belong_together(tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "mine" / "a.png")
    check(run("tour", "--images", "mine", cwd=tmp_path), tmp_path, "--question")
    check(run("tour", "--question", "What?", cwd=tmp_path), tmp_path, "--images")


def test_an_unwritable_output_is_told_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file/tour.html", "."):
        done = run("tour", "--out", out, cwd=tmp_path)
        check(done, tmp_path, out, "--out")
        assert "million parameters" not in done.stdout, "the tour began"
    check(run("tour", "--n", 10**6, cwd=tmp_path), tmp_path, "1000000")


def test_too_little_memory_is_told_before_loading(tmp_path):
    """A model directory whose (sparse) weight file promises 4 TB."""
    from safetensors.torch import save_file

    folder = bad_model("as it is", tmp_path / "vast")
    save_file({"w": torch.zeros(4, dtype=torch.float32)}, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    elements = 10**12
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["w"].update(shape=[elements], data_offsets=[0, 4 * elements])
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + 4 * elements)
    check(run("tour", "--model", "vast", cwd=tmp_path), tmp_path, "vast", "GB")


def test_training_refuses_what_it_would_destroy_and_what_it_does_not_know(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("years of work")
    check(run("train", "mini-vlm", "--out", "thesis", cwd=tmp_path), tmp_path, "thesis")
    check(run("train", "mini-cnn", "--out", "thesis", cwd=tmp_path), tmp_path, "thesis")
    check(run("train", "mini-siglip", "--out", "thesis", cwd=tmp_path), tmp_path, "thesis")
    check(run("train", "maxi-vlm", cwd=tmp_path), tmp_path, "maxi-vlm", "mini-vlm", "mini-siglip", "mini-cnn")
    assert (tmp_path / "thesis" / "text.txt").exists()


def test_training_mini_cnn_writes_it(tmp_path):
    done = run("train", "mini-cnn", "--out", "made", "--steps", 2, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote made" in done.stdout
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "training.json"} <= {
        p.name for p in (tmp_path / "made").iterdir()
    }
