"""`mmrecipes shrink`: the whole way on models that are known, foreign and hard; what it promises is kept, or nothing is left."""

import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from rich.console import Console

import tiny
from mmrecipes import data, evaluate, export, inference, measure, models, quantize, shrink
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.shrink import artifact, candidates, fidelity, folders
from mmrecipes.shrink import pipeline as shrink_pipeline
from mmrecipes.shrink import source as shrink_source
from mmrecipes.shrink.source import Source
from tests import families

ALONE = """import os, runpy, sys; sys.modules.update(dict.fromkeys(("mmrecipes", "torch", "torchvision"))); sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name="__main__")"""  # as Python runs a script
MB = 1e6


def run(dry_run=False, **request):
    """The command, quick: few rows to plan on. Returns what it found and what it printed."""
    console = Console(record=True, width=150, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        return shrink.run(shrink.Request(**request, stage_seconds=1.5), dry_run, console), console.export_text()


def draw(folder, count, side=64):
    folder.mkdir()
    for i in range(count):
        scenes.render(scenes.make_scene(i), side + i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def small(house_vlm, tmp_path_factory):
    """The house model, as small as it holds."""
    out = tmp_path_factory.mktemp("small") / "mini"
    return out, *run(model="mini-vlm", out=out, n=100)


@pytest.fixture(scope="module")
def foreign(foreign_vlm, tmp_path_factory):
    """A tiny LLaVA with a folder of pictures, without labels, for OpenVINO; after a run to the same place that was killed."""
    folder = tmp_path_factory.mktemp("foreign")
    draw(folder / "mine", 4)
    command = [sys.executable, "-m", "mmrecipes.cli", "shrink", str(foreign_vlm), "--out", "out", "--images", "mine"]
    command += ["--runtime", "openvino", "--max-loss", "100"]
    child = subprocess.Popen(command, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    while not (folder / ".out.part" / ".model.part").exists():  # in the middle of its work
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = sorted(p.name for p in folder.iterdir())
    out = folder / "out"
    return out, *run(model=str(foreign_vlm), out=out, images=folder / "mine", runtime="openvino", max_loss=100), left


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An untrained mini-vlm of one layer, for PyTorch, verified on pictures with answers that it does not know."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.save(tiny.house(), folder / "house")
    draw(folder / "mine", 4)
    lines = [{"image": f"{i}.png", "question": q, "answer": "42"} for i in range(4) for q in ("How many?", "Why?")]
    (folder / "mine" / "questions.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    out = folder / "out"
    return out, *run(model=str(folder / "house"), out=out, images=folder / "mine", runtime="torch", max_loss=100)


@pytest.fixture(scope="module")
def spiky(house_vlm, tmp_path_factory):
    """The house model with every other input of each layer 30 times as large, and its norm that much smaller: the same function,
    which 8 bits hold and 4 bits do not."""
    model = models.load(house_vlm)
    vision, text = model.model.vision_model.encoder.layers, model.model.text_model.layers
    pairs = [(b.layer_norm1, [b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj]) for b in vision]
    pairs += [(b.layer_norm2, [b.mlp.fc1]) for b in vision]
    pairs += [(b.input_layernorm, [b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj]) for b in text]
    pairs += [(b.post_attention_layernorm, [b.mlp.gate_proj, b.mlp.up_proj]) for b in text]
    with torch.no_grad():
        for norm, layers in pairs:
            for p in norm.parameters():
                p[::2] /= 30
            for layer in layers:
                layer.weight[:, ::2] *= 30
    path = tmp_path_factory.mktemp("spiky") / "vlm"
    return models.save(model, model.processor, path, torch.float32)


# ---- the whole way


def test_the_house_model_gets_small_and_keeps_its_answers(small):
    out, found, printed = small
    loss = found["loss"]
    assert loss.measure == "accuracy" and loss.n == 100
    assert loss.low <= loss.points <= 1.0 and loss.points <= loss.high < 8
    assert found["bytes"] < 0.3 * found["float_bytes"]
    loaded, rows = inference.load_exported(out), data.test_split(20)
    assert evaluate.answers(loaded, rows["image"][:], rows["question"][:]) == found["answers"][:20], "what was reported is there"
    right = sum(a == b for a, b in zip(found["answers"], data.test_split(100)["answer"], strict=True))
    assert right == round(100 * loss.share.value)
    for words in ("predicted MB", "accuracy", "TTFT", "report.html", "8/8"):
        assert words in printed


@pytest.mark.parametrize("made", ["small", "plain"])
def test_the_predicted_size_is_the_real_one(made, request):
    out, found, _ = request.getfixturevalue(made)
    predicted, real = found["candidates"][found["chosen"]].bytes, measure.disk_bytes(out)
    assert predicted == pytest.approx(real, rel=0.1)
    assert real == found["bytes"]


def test_the_example_runs_a_model_whose_parts_have_two_runtimes(house_vlm, tmp_path):
    vlm, where = models.load(house_vlm), {"vision": "openvino", "language": "onnx"}
    made = export.export(vlm, tmp_path / "made", where, {"vision": "fp32", "language": "fp32"})
    image, question = scenes.render(scenes.make_scene(3), 128), "How many objects are there?"
    image.save(made / artifact.IMAGE)
    assert artifact.ran_by(made) == "openvino_onnx"
    (made / artifact.EXAMPLE).write_text(artifact.example_code("openvino_onnx"), encoding="utf-8")
    (made / artifact.FAMILY).write_text(artifact.family_code(vlm), encoding="utf-8")
    answer, peak = artifact._run_example(made, question, "openvino_onnx")
    assert answer == inference.load_exported(made).generate(image, question) == models.ask(vlm, image, question)
    assert peak > 0


def test_shrunk_for_the_fastest_vision_encoder(house_vlm, tmp_path):
    out = tmp_path / "out"
    found, printed = run(model=str(house_vlm), out=out, n=32, runtime="auto", max_loss=100)
    assert [row["runtime"] for row in found["vision"]] == ["onnx", "onnx", "openvino"] and "(kept)" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    kept = next(row for row in found["vision"] if row["kept"])
    assert inference.load_exported(out).manifest["precision"]["vision"] == kept["precision"]
    assert measure.disk_bytes(out) == found["bytes"]


def test_without_labels_agreement_is_the_measure_and_a_killed_run_leaves_nothing(foreign):
    out, found, printed, left = foreign
    assert left == [".out.part", "mine"], "the killed run left no result"
    assert sorted(p.name for p in out.parent.iterdir()) == ["mine", "out"], "and its remains are gone"
    assert found["loss"].measure == "agreement" and "agreement" in printed and "accuracy" not in printed
    assert found["loss"].n == sum(len(same) for same in found["answers"])
    assert found["rows"]["images"] == 2, "the other half calibrated"
    assert found["loss"].high > 30, "two pictures prove little"
    assert inference.load_exported(out).manifest["runtime"] == "openvino"


def test_answers_that_the_original_does_not_know_are_no_measure(plain):
    out, found, _ = plain
    assert found["loss"].measure == "agreement"
    model = quantize.load_nf4(out)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("Linear4bit") == sum(
        len(quantize.units(tiny.house())[u]) for u, b in found["candidates"][found["chosen"]].plan.items() if b == 4
    )
    assert kinds.count("Linear4bit") > 5


def test_the_plan_is_in_the_files(small):
    import onnx

    out, found, _ = small
    nodes = [n.op_type for part in ("vision", "language") for n in onnx.load(out / f"{part}.onnx").graph.node]
    assert "MatMulNBits" in nodes
    content = json.loads((out / "report.json").read_text())
    assert content["plan"] == found["candidates"][found["chosen"]].plan and 4 in content["plan"].values()
    assert content["bytes"]["all"] == sum(content["bytes"]["files"].values())
    assert content["loss"]["points"] == found["loss"].points and content["environment"]["versions"]["onnxruntime"]
    assert {c["unit"] for c in content["sensitivity"]} <= set(content["plan"])


@pytest.mark.parametrize("made", ["small", "foreign", "plain"])
def test_the_report_stands_alone_and_shows_both_answers(made, request):
    out, found, *_ = request.getfixturevalue(made)
    page = (out / "report.html").read_text()
    assert not re.search(r'(?:src|href)\s*=\s*"?(?!"?data:)', page) and "http" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 1 + len(found["examples"]) >= 3
    for each in found["examples"]:
        assert html.escape(each["question"]) in page
    assert str(out.parent) not in page, "no path of the machine where it was made"


@pytest.mark.parametrize("made", ["small", "foreign", "plain"])
def test_the_example_answers_as_the_model_does(made, request):
    out, found, *_ = request.getfixturevalue(made)
    question, answer = found["example"].values()  # from a process that had no mmrecipes
    model = artifact.open_artifact(out, found["request"].runtime)
    if made == "plain":
        assert answer == models.ask(model, out / "example.png", question, 64)
    else:
        assert answer == model.generate(out / "example.png", question, max_new_tokens=64)
    text = (out / "example.py").read_text()
    assert "import mmrecipes" not in text and "from mmrecipes" not in text and len(text.splitlines()) <= 76


def test_the_example_runs_anywhere(small, tmp_path):
    copy = shutil.copytree(small[0], tmp_path / "else where")
    picture, question = tmp_path / "my picture.png", "How many objects are there?"
    scenes.render(scenes.make_scene(77), 128).save(picture)
    command = [sys.executable, "-c", ALONE, str(copy / "example.py"), str(picture), question]
    env = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == inference.load_exported(copy).generate(picture, question)


@pytest.mark.parametrize(("family", "runtime"), [("smolvlm", "openvino"), ("qwen3_vl", "onnx")])
def test_a_family_whose_processor_wants_torchvision_goes_the_whole_way(family, runtime, tmp_path):
    """Images of any shape, M-RoPE, DeepStack; the example runs without PyTorch and without torchvision."""
    draw(tmp_path / "mine", 3)
    Image.open(tmp_path / "mine" / "1.png").resize((96, 48)).save(tmp_path / "mine" / "1.png")
    model, out = families.family_dir(family), tmp_path / "out"
    found, printed = run(model=str(model), out=out, runtime=runtime, images=tmp_path / "mine", n=2, max_loss=100)
    loaded, verify = inference.load_exported(out), found["example"]
    assert verify["answer"] == loaded.generate(out / "example.png", verify["question"])
    assert not re.search(r"(import|from) mmrecipes", (out / "model_family.py").read_text())
    plan = found["candidates"][found["chosen"]].plan
    predicted = shrink_source.weight_bytes(Source(models.load(model), runtime), plan)
    if runtime == "onnx":
        import onnx

        graphs = [onnx.load(out / f"{part}.onnx").graph for part in ("vision", "language")]
        written = sum(len(tensor.raw_data) for graph in graphs for tensor in graph.initializer)
    else:
        written = sum(path.stat().st_size for path in out.glob("*.bin"))
    assert predicted == pytest.approx(written, rel=0.02), "the weights alone, without what describes the graphs"
    assert "Kept in float: " in printed and json.loads((out / "report.json").read_text())["kept_in_float"] == found["kept"]
    assert any("patch_embed" in name for name in found["kept"]) is (runtime == "onnx"), "OpenVINO's 8 bits reach convolutions"
    own = (model / "model.safetensors").stat().st_size
    assert found["own_bytes"] == own and "the source's own files" in printed


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_layer_that_is_read_and_not_called_stays_as_it_is(runtime, tmp_path):
    """mini-resampler's `nn.MultiheadAttention` reads the weight of its `out_proj`: nothing flows through that layer."""
    out = tmp_path / "out"
    found, _ = run(model="mini-resampler", out=out, runtime=runtime, n=24, max_loss=100)
    assert any(name.startswith("model.resampler.attn") for name in found["kept"])
    assert 4 in found["candidates"][found["chosen"]].plan.values() and found["bytes"] < 0.4 * found["float_bytes"]
    model, rows = models.load("mini-resampler"), data.test_split(12)
    made = artifact.open_artifact(out, runtime)
    wanted = [models.ask(model, row["image"], row["question"]) for row in rows]
    assert sum(a == b for a, b in zip(evaluate.answers(made, rows["image"][:], rows["question"][:]), wanted, strict=True)) >= 9


# ---- plans


def test_a_dry_run_climbs_to_a_plan_that_holds_and_writes_nothing(spiky, tmp_path):
    found, printed = run(dry_run=True, model=str(spiky), out=tmp_path / "new" / "out", max_loss=15.0)
    tried, chosen = found["candidates"], found["chosen"]
    assert tried[0].loss.points > 15, "4 bits everywhere break this model"
    assert chosen > 0 and tried[chosen].loss.points <= 15
    assert [c.bytes for c in tried] == sorted(c.bytes for c in tried)
    assert all(b == 4 for b in tried[0].plan.values()) and all(b == 8 for b in tried[-1].plan.values())
    assert "predicted MB" in printed and "Nothing was written" in printed
    assert list(tmp_path.iterdir()) == []


def test_what_loses_too_much_is_not_kept_and_the_older_result_stays(spiky, tmp_path, small):
    out = shutil.copytree(small[0], tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(
        UserError, match=r"loses .* points of accuracy .*more than --max-loss 1\b.*give --budget [\d.]+MB"
    ) as error:
        run(model=str(spiky), out=out, budget="0.2x", n=32, runtime="torch")
    advised = re.search(r"--budget ([\d.]+)MB, or", str(error.value))[1]
    assert 0.2 * 23.69 < float(advised) < 0.52 * 23.69
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("runtime", ["onnx", "openvino", "torch"])
def test_a_budget_is_kept_and_spent_where_it_helps_most(runtime):
    source = Source(tiny.house(), runtime)
    four = candidates.eligible_units(source)
    table = []
    for i, unit in enumerate(four):  # a loss for each, made up
        for bits in (source.high, 4):
            size = shrink_source.unit_bytes(source, unit, bits)
            table.append(quantize.Cost(unit, "", bits, size, (i + 1.0) if bits == 4 else 0.0))
    most, least = (shrink_source.predicted_bytes(source, source.plan(units)) for units in ((), four))
    middle = candidates.best(source, table, (least + most) / 2)
    assert least < middle.bytes <= (least + most) / 2
    assert candidates.best(source, table, least).plan == source.plan(four)
    assert candidates.best(source, table, most).divergence == 0
    tried = candidates.series(source, table)
    assert [c.divergence for c in tried] == sorted((c.divergence for c in tried), reverse=True)
    with pytest.raises(UserError, match=r"with 4 bits wherever they fit the model takes [\d.]+ MB \(0\.\d+x\)"):
        candidates.best(source, table, least - 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [("0.25x", 25e6), (".5X", 50e6), ("80MB", 80e6), ("80 mb", 80e6), ("512KB", 512e3), ("1.5GB", 1.5e9), ("64MiB", 64 * 2**20)],
)
def test_budgets_are_shares_or_sizes(text, found):
    assert shrink_source.budget_bytes(text, 100_000_000) == int(found)


@pytest.mark.parametrize(
    "text", ["", "x", "80", "-1MB", "0x", "0MB", "1x", "4x", "eighty MB", "80TB", "0.25x80MB", "nanx", "80M"]
)
def test_other_budgets_are_refused(text):
    with pytest.raises(UserError, match=r"--budget .*such as 0\.25x"):
        shrink_source.budget_bytes(text, 100_000_000)


# ---- how answers compare


def test_a_penalty_on_repetition_is_no_loss(foreign_vlm):
    """The original's setting; both sides are compared by their likeliest tokens, and the original keeps it."""
    rows = folders.gather(64, None, None, 4).verify
    model = models.load(foreign_vlm)
    plain = fidelity.greedy_tokens(model, rows)
    model.generation_config.update(repetition_penalty=1.9, no_repeat_ngram_size=1)
    assert evaluate.generation.answer_tokens(model, rows["image"][:], rows["question"][:], 8, 12) != plain, "it changes answers"
    judge = fidelity.make_evaluator(model, rows)
    assert judge.tokens == plain and judge.loss(model)[0].points == 0
    first = [ids[:1] for ids in plain]
    assert all(map(all, fidelity.token_agreement(model, rows, first))), "answers of one token, too"
    assert fidelity.settings(model) == {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1}


def test_a_model_agrees_with_itself_and_a_broken_one_does_not(house_vlm):
    model = models.load(house_vlm)
    rows = folders._drawn("validation", 12, 128)
    own = fidelity.greedy_tokens(model, rows)
    assert all(ids[-1] in evaluate.eos_token_ids(model) for ids in own), "answers end where the model stopped"
    same = fidelity.token_agreement(model, rows, own)
    assert [len(s) for s in same] == [len(ids) for ids in own] and all(map(all, same))
    broken = quantize.simulate(model, 2)
    lost = fidelity.agreement_loss(fidelity.token_agreement(broken, rows, own), rows["name"])
    assert lost.points > 5 and lost.low < lost.points < lost.high
    assert fidelity.with_answers(model, rows)["answer"] == evaluate.answers(model, rows["image"][:], rows["question"][:])


def test_the_interval_goes_by_pictures():
    alone = evaluate.clustered([9, 8, 9, 9, 8, 9, 9, 9], [10] * 8)
    whole = evaluate.clustered([10, 0, 10, 10, 0, 10, 10, 10], [10] * 8)  # the same tokens of a picture are all right or wrong
    assert alone.n == whole.n == 80
    assert alone.high - alone.low <= whole.high - whole.low
    by_picture = evaluate.wilson(6, 8)
    assert whole.high - whole.low == pytest.approx(by_picture.high - by_picture.low, rel=0.15)
    alike = fidelity.agreement_loss([[True] * 9 + [False]] * 3 + [[True] * 8 + [False] * 2], ["a", "a", "b", "b"])
    assert alike.high > 50, "two images that happen to be alike prove no more than two draws"
    perfect = evaluate.clustered([10] * 8, [10] * 8)
    assert perfect.high == 1 and perfect.low == pytest.approx(evaluate.wilson(8, 8).low)


def test_no_change_on_few_questions_is_no_proof():
    few, many = (fidelity.accuracy_loss([True] * n, [True] * n) for n in (20, 2000))
    assert few.points == many.points == 0
    assert few.low == -few.high and few.high > 10 and 0 < many.high < 0.5
    worse = fidelity.accuracy_loss([True] * 100, [True] * 90 + [False] * 10)
    assert worse.points == 10 and 0 < worse.low < 10 < worse.high < 20


def test_labels_count_where_the_original_knows_them():
    yes_no = ["yes", "no"] * 20
    assert fidelity.knows([True] * 38 + [False] * 2, yes_no)
    assert not fidelity.knows([True] * 22 + [False] * 18, yes_no), "a coin would do that"
    assert not fidelity.knows([False] * 40, ["a", "b", "c", "d"] * 10)
    assert fidelity.right(["A cat.", "Two", "red"], ["a cat", "two", "blue"]) == [True, True, False]


# ---- the user's folders


def test_pictures_are_never_on_both_sides(tmp_path):
    draw(tmp_path / "a", 10)
    (tmp_path / "a" / "questions.jsonl").write_text(
        "\n".join(json.dumps({"image": f"{i % 10}.png", "question": f"What is {i}?", "answer": "x"}) for i in range(30))
    )
    for given in ((None, tmp_path / "a"), (tmp_path / "a", tmp_path / "a")):
        rows = folders.gather(64, *given, 1000)
        sides = [set(r["name"]) for r in (rows.calibrate, rows.choose, rows.verify)]
        assert len(sides[0] | sides[1]) == len(sides[2]) == 5 and not (sides[0] | sides[1]) & sides[2]
        assert len(rows.verify) == 15 and rows.verify["answer"][:] == ["x"] * 15
    draw(tmp_path / "b", 12, side=90)
    rows = folders.gather(64, tmp_path / "b", tmp_path / "a", 7)
    assert len(rows.verify) == 7 and len(rows.calibrate) == 3 * 9 and len(rows.choose) == 3 * 3
    assert not set(rows.calibrate["name"]) & set(rows.choose["name"]) and "answer" not in rows.calibrate.column_names
    (tmp_path / "b" / "twin.jpg").write_bytes((tmp_path / "a" / "3.png").read_bytes())
    with pytest.raises(UserError, match=r"3\.png is to verify on.*twin\.jpg"):
        folders.gather(64, tmp_path / "b", tmp_path / "a", 1000)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ('["0.png", "What?"]', "line 2: .*expected"),
        ('{"image": "0.png"}', "line 2: .*expected"),
        ('{"image": "0.png", "question": " "}', "line 2: .*expected"),
        ('{"image": 3, "question": "What?"}', "line 2: .*expected"),
        ('{"image": "nowhere.png", "question": "What?"}', r"line 2: .*nowhere\.png: no such image"),
        ('{"image": "0.png", "question": "What?", "answer": 7}', "line 2: the answer is 7"),
        ('{"image": "0.png", "question": "What?", "answer": "7"}', "line 2: some lines have an answer"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    draw(tmp_path / "mine", 2)
    (tmp_path / "mine" / "questions.jsonl").write_text('{"image": "1.png", "question": "What?"}\n' + line)
    with pytest.raises(UserError, match=rf"questions\.jsonl, {said}"):
        folders.read_folder(tmp_path / "mine")


def test_calibration_on_blank_images_is_warned_of(tmp_path):
    draw(tmp_path / "seen", 3)
    (tmp_path / "blank").mkdir()
    for i in range(8):
        Image.new("RGB", (64 + i, 64), "white").save(tmp_path / "blank" / f"{i}.png")
    with pytest.warns(UserWarning, match="calibrate span 0% of the range of those that verify: too little"):
        rows = folders.gather(64, tmp_path / "blank", tmp_path / "seen", 9)
    assert any("span 0%" in note for note in rows.notes)
    draw(tmp_path / "others", 9, side=80)
    for file in sorted((tmp_path / "others").iterdir())[:3]:  # the same scenes, in other sizes
        file.unlink()
    assert not any("span" in note for note in folders.gather(64, tmp_path / "others", tmp_path / "seen", 9).notes)


def test_bad_folders_are_named(tmp_path):
    draw(tmp_path / "one", 1)
    (tmp_path / "none").mkdir()
    draw(tmp_path / "bad", 2)
    (tmp_path / "bad" / "z.png").write_text("not a picture")
    draw(tmp_path / "mute", 2)
    (tmp_path / "mute" / "questions.jsonl").write_text("\n\n")
    draw(tmp_path / "odd", 2)
    (tmp_path / "odd" / "questions.jsonl").write_bytes(b"\xff\xfe\xff")
    for name, said in (
        ("one", "one image; give 2 images or more"),
        ("none", "no images in it"),
        ("nowhere", "no such folder"),
        ("mute", "empty"),
        ("odd", "cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            folders.read_folder(tmp_path / name)
    with pytest.warns(UserWarning, match=r"1 of 3 images are left out: .*z\.png: not an image"):
        assert len(set(folders.read_folder(tmp_path / "bad")["name"])) == 2


def test_questions_are_spread_over_images_in_a_drawn_order(tmp_path):
    draw(tmp_path / "mine", 16)
    rows = folders.gather(64, None, tmp_path / "mine", 8)
    verify, calibrate = rows.verify["name"][:], rows.calibrate["name"][:]
    assert len(set(verify)) == 8, "one question about each image before a second one"
    assert len(set(rows.verify["question"])) > 1, "and not the same one"
    assert verify != sorted(verify) and {f"{i}.png" for i in range(8)} not in (set(verify), set(calibrate))
    assert folders.gather(64, None, tmp_path / "mine", 8).verify["name"][:] == verify, "the same each time"


# ---- what cannot be done


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "idefics2"])
def test_a_dry_run_refuses_first_what_the_runtime_cannot_do(family, tmp_path):
    with pytest.raises(UserError, match=rf"\({family}\) cannot be exported for executorch: .*; use onnx or openvino"):
        run(dry_run=True, model=str(families.family_dir(family)), out=tmp_path / "out", runtime="executorch")


def test_what_nobody_foresaw_is_one_line_with_model_and_stage():
    stage = shrink_pipeline._Stages(Console(file=io.StringIO()), 8)
    stage.model = "NewForConditionalGeneration"
    said = r"not supported yet: NewFor\w+, choosing a plan \(KeyError: 'x'\); --debug"
    with pytest.raises(UserError, match=said) as error, stage("choosing a plan"):
        raise KeyError("x")
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"runtime": "abacus"}, "'abacus': expected one of onnx, openvino"),
        ({"budget": "much"}, "--budget 'much'"),
        ({"max_loss": -1.0}, "--max-loss -1"),
        ({"max_loss": float("nan")}, "--max-loss nan"),
        ({"images": "nowhere"}, "nowhere: no such folder"),
        ({"calib": "nowhere"}, "nowhere: no such folder"),
        ({"budget": "20KB"}, r"the model takes [\d.]+ MB"),
        ({"out": "taken"}, "left alone"),
        ({"out": "file"}, "is a file"),
        ({"model": "nowhere"}, "no model at 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_left(foreign_vlm, tmp_path, monkeypatch, asked, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    draw(tmp_path / "mine", 2)
    request = {"model": str(foreign_vlm), "out": "out", "images": "mine", "n": 2} | asked
    paths = {k: tmp_path / request[k] for k in ("out", "images", "calib") if k in request}
    with pytest.raises(UserError, match=said):
        run(**request | paths)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine", "taken"]


@pytest.mark.parametrize("out", ["mine", "."])
def test_the_checkpoint_itself_is_never_replaced(tmp_path, out):
    own = tmp_path / "config.json"  # without it the parent directory would be left alone for another reason
    own.write_text('{"model_type": "llava"}')
    tiny.save(tiny.llava(), tmp_path / "mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    model = models.load(tmp_path / "mine")
    for call in (lambda: run(model=str(tmp_path / "mine"), out=tmp_path / out), lambda: export.export(model, tmp_path / out)):
        with pytest.raises(UserError, match="only read; give another directory"):
            call()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_models_without_a_recipe_are_refused_before_any_work(tmp_path):
    tiny.save(tiny.siglip(), tmp_path / "siglip")
    for runtime in ("onnx", "torch"):
        with pytest.raises(UserError, match="give a model that answers"):
            run(model=str(tmp_path / "siglip"), out=tmp_path / "out", runtime=runtime)
    with pytest.raises(UserError, match=r"code from its own directory.*onnx or openvino"):
        run(model="mini-resampler", out=tmp_path / "out", runtime="torch")
    assert [p.name for p in tmp_path.iterdir()] == ["siglip"]


def test_an_interrupt_leaves_nothing(foreign_vlm, tmp_path):
    draw(tmp_path / "mine", 2)
    command = [sys.executable, "-m", "mmrecipes.cli", "shrink", str(foreign_vlm), "--out", "out", "--images", "mine"]
    command += ["--max-loss", "100"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests started in the background ignore it
    )
    while not (tmp_path / ".out.part" / ".model.part").exists():  # in the middle of its export
        assert child.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == 130 and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_transparent_and_turned_pictures_are_taken(tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(tmp_path / "mine" / "clear.png")
    Image.new("L", (30, 40), 99).save(tmp_path / "mine" / "grey.webp")
    rows = folders.read_folder(tmp_path / "mine")
    assert len(rows) == 2 * len(folders.GENERAL_QUESTIONS) and {p.mode for p in rows["image"]} == {"RGB"}
    assert rows[0]["image"].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("wanted", "drawn"), [(32, 64), (128, 128), (1280, 1024)])
def test_scenes_are_drawn_as_near_to_the_models_size_as_can_be(wanted, drawn):
    rows = folders.gather(wanted, None, None, 7)
    assert rows.verify[0]["image"].size == rows.calibrate[0]["image"].size == (drawn, drawn)
