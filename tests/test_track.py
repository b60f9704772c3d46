"""The experiment record: off by default, offline, resumed, killed, absent. TRACKIO_DIR is read once a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import programs
from mmrecipes import track
from mmrecipes.report import runs

TRAIN = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from mmrecipes import train

torch.manual_seed(0)
torch.set_num_threads(1)
model, batches = nn.Linear(3, 2), [torch.randn(8, 3) for _ in range(60)]

def loss(model, batch):
    time.sleep(float(sys.argv[2]))
    return (model(batch) - batch[:, :2]).square().mean(), {"other": 1.0}

config = train.TrainConfig(60, 8, 0.1, 0.1, checkpoint_every=10, about="a line", device="cpu")
train.fit(model, batches, loss, config, Path(sys.argv[1]))
"""
READ = """
import json
from mmrecipes.report import runs
print(json.dumps([vars(run) for run in runs.read()]))
"""
OFFLINE = """
import json, sys
from pathlib import Path

def guard(event, args):  # what leaves this machine is refused, and so is asking for a name
    inet = event == "socket.connect" and isinstance(args[1], tuple)
    host = args[1][0] if inet else args[0] if event == "socket.getaddrinfo" else None
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"{event} {args}")

sys.addaudithook(guard)
from PIL import Image
from mmrecipes import models, track

with track.running("shown", lambda: {"seed": 3, "folder": Path("here")}):
    track.log({"loss": 0.5}, step=0)
    track.log({"name": "wrong answer"}, images={"a red circle -> blue": Image.new("RGB", (20, 10), "red")})
share = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 70}
content = {"environment": {"commit": "abc"}, "rows": [{"name": "int8", "accuracy": share, "disk_mb": 6.5, "ms": 3.0}]}
for ms in (3.0, 3.0, 4.0):
    content["rows"][0]["ms"] = ms
    models.write_json(Path("bench.json"), content)
models.write_json(Path("no_measurement.json"), {"rows": [1]})
try:
    with track.running("broken", dict):
        raise ValueError("too lossy")
except ValueError:
    pass
"""

SHRINK = """
import io, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import tiny
from rich.console import Console
from mmrecipes import shrink
from mmrecipes.data import scenes
from mmrecipes.errors import UserError

tiny.save(tiny.house(), Path("house"))
Path("mine").mkdir()
for i in range(4):
    scenes.render(scenes.make_scene(i), 64 + i).save(f"mine/{i}.png")
for runtime in ("torch", "none"):
    request = shrink.Request("house", Path("out"), runtime, max_loss=100, images=Path("mine"), stage_seconds=1)
    try:
        shrink.run(request, console=Console(file=io.StringIO()))
    except UserError as e:
        print(e)
"""
TOO_OLD = """
from mmrecipes import track
try:
    track.storage()
except ImportError as e:
    print(e)
"""


def environment(folder: Path, **other: str) -> dict[str, str]:
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    found = {"TRACKIO_DIR": str(folder / "record"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return {k: v for k, v in os.environ.items() if k != track.VARIABLE} | found | other


def python(text: str, folder: Path, *args: str, blocked: str | None = None, **other: str) -> str:
    script = folder / "script.py"
    script.write_text(text)
    done = programs.run([script, *args], folder, environment(folder, **other), blocked)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recorded(folder: Path) -> list[dict]:
    return json.loads(python(READ, folder))


def test_off_unless_asked_for(tmp_path):
    said = python(TRAIN + "\nprint('trackio' in sys.modules)", tmp_path, str(tmp_path / "work"), "0")
    assert said.splitlines()[-1] == "False"
    assert not (tmp_path / "record").exists() and not (tmp_path / "work" / "run_id").exists()


def test_a_killed_training_loses_no_step_and_goes_on_as_the_same_run(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, str(script), str(tmp_path / "work")]
    on = environment(tmp_path, **{track.VARIABLE: "1"})
    process = subprocess.Popen([*command, "0.05"], env=on)
    log = tmp_path / "work" / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 25):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9, "the run was over before it could be killed"
    (killed,) = recorded(tmp_path)
    steps, logged = [row["step"] for row in killed["rows"]], log.read_text().count("\n")
    assert steps == list(range(len(steps))) and logged - 1 <= len(steps) <= logged and logged % 10
    subprocess.run([*command, "0"], env=on, check=True)
    (whole,) = recorded(tmp_path)
    assert whole["id"] == killed["id"] and [row["step"] for row in whole["rows"]] == list(range(60))
    assert {"loss", "other", "seconds"} <= set(whole["rows"][-1])
    assert {"steps": 60, "about": "a line", "model": "Linear", "trained": 8, "seed": 0}.items() <= whole["config"].items()
    assert whole["config"]["first batch"] == killed["config"]["first batch"] and whole["config"]["cpu"]


def test_what_was_trained_before_the_record_was_on_is_added(tmp_path):
    work, stops = str(tmp_path / "work"), TRAIN.replace("    time.sleep", "    assert next(left) < 35\n    time.sleep")
    (tmp_path / "stops.py").write_text("left = iter(range(60))\n" + stops)
    done = programs.run([tmp_path / "stops.py", work, "0"], tmp_path, environment(tmp_path))
    assert "AssertionError" in done.stderr and not (tmp_path / "record").exists()
    python(TRAIN, tmp_path, work, "0", **{track.VARIABLE: "1"})
    (run,) = recorded(tmp_path)
    assert [row["step"] for row in run["rows"]] == list(range(60))


def test_nothing_connects_anywhere_and_rows_images_results_and_errors_are_kept(tmp_path):
    python(OFFLINE, tmp_path, **{track.VARIABLE: "1"})
    shown, bench, broken = recorded(tmp_path)
    assert shown["config"] == {"seed": 3, "folder": "here"} and shown["rows"][0]["loss"] == 0.5
    image = shown["rows"][1]["image 0"]
    assert image["caption"] == "a red circle -> blue" and (tmp_path / "record" / "media" / image["file_path"]).is_file()
    assert [row["ms"] for row in bench["rows"]] == [3.0, 4.0], "what did not change is logged once"
    assert bench["points"][0] == {"name": "int8", "accuracy": 0.9, "mb": 6.5, "ms": 3.0}
    assert bench["config"]["commit"] == "abc" and broken["rows"][0]["failed"] == "too lossy"


def test_a_shrink_is_one_run_from_the_data_to_the_answers_that_changed(tmp_path):
    python(SHRINK, tmp_path, str(Path(__file__).parent), **{track.VARIABLE: "1"})
    done, refused = recorded(tmp_path)
    assert done["name"] == "shrink house" and done["config"]["runtime"] == "torch" and "cpu" in done["config"]
    assert {"calibrate", "choose", "verify"} <= set(done["rows"][0])
    names = [row.get("name", "") for row in done["rows"]]
    assert "candidate 0" in names and "export 0" in names and "other answers" in names
    images = [value for row in done["rows"] for key, value in row.items() if key.startswith("image ")]
    assert len(images) == next(row["examples"] for row in done["rows"] if row.get("name") == "other answers")
    assert any("disk_mb" in row for row in done["rows"]), "the report's table"
    assert "--runtime 'none'" in refused["rows"][0]["failed"]


def test_where_trackio_is_missing_or_too_old_the_extra_is_named(tmp_path):
    command = ["-m", "mmrecipes.cli", "train", "mini-cnn", "--work", tmp_path / "work", "--track"]
    done = programs.run(command, tmp_path, environment(tmp_path), blocked="trackio")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "mmrecipes[track]" in done.stderr
    old = tmp_path / "old"
    (old / "trackio-0.0.6.dist-info").mkdir(parents=True)
    (old / "trackio-0.0.6.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 0.0.6\n")
    (old / "trackio.py").write_text("")
    said = python(f"import sys; sys.path.insert(0, {str(old)!r})\n" + TOO_OLD, tmp_path)
    assert "trackio 0.0.6 is too old" in said and "mmrecipes[track]" in said
    assert not (tmp_path / "work").exists()


def test_runs_lists_compares_and_draws(tmp_path):
    for bits, commit in ((8, "a" * 40), (4, "b" * 40)):
        rows = [
            {"name": f"int{bits}", "accuracy": 0.9 + bits / 100, "mb": bits / 2},
            {"name": f"worse{bits}", "accuracy": 0.5, "mb": 9},
        ]
        text = (
            f"from mmrecipes import track\ntrack.log_results('try', {{'environment': {{'commit': '{commit}'}}, 'rows': {rows}}})"
        )
        python(text, tmp_path, **{track.VARIABLE: "1"})
    env = environment(tmp_path, COLUMNS="200")
    done = programs.run(["-m", "mmrecipes.cli", "runs", "--plot", "front.png"], tmp_path, env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("yes" in line for line in lines) == 2 and any("commit" in line and "a" * 40 in line for line in lines)
    assert (tmp_path / "front.png").stat().st_size > 1000
    done = programs.run(["-m", "mmrecipes.cli", "runs", "nothing"], tmp_path, env)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nothing" in done.stderr


def test_the_front_holds_what_no_other_beats():
    points = [{"accuracy": a, "mb": mb} for a, mb in ((0.9, 10), (0.9, 8), (0.8, 4), (0.7, 6), (0.95, 20))]
    assert [(p["accuracy"], p["mb"]) for p in runs.pareto(points, "mb")] == [(0.8, 4), (0.9, 8), (0.95, 20)]


def test_numbers_of_nested_results_become_flat_rows():
    content = {
        "n": 3,
        "deep": {"a": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "text": "no"}},
        "rows": [{"name": "b", "x": 1}],
    }
    assert list(track.number_rows(content)) == [
        {"name": "deep/a", "accuracy": 0.5, "accuracy low": 0.4, "accuracy high": 0.6},
        {"name": "b", "x": 1},
        {"name": "", "n": 3},
    ]


def test_equal_data_have_equal_hashes():
    import numpy as np
    import torch
    from PIL import Image

    def rows(colour: str, value: float) -> list:
        image = Image.new("RGB", (4, 3), colour)
        return [{"image": image, "question": "what?"}, torch.full((2,), value, dtype=torch.bfloat16), np.arange(3)]

    assert track.data_hash(rows("red", 1.0)) == track.data_hash(rows("red", 1.0))
    assert len({track.data_hash(rows(*each)) for each in (("red", 1.0), ("blue", 1.0), ("red", 2.0))}) == 3
