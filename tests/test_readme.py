"""README.md says what is so: its links, commands, badges and tables; and versions agree wherever they are written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

import readme
import recipes
from paths import ROOT

BASH = re.compile(r"```(?:bash|sh|shell|console)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:img|a)[^>]+(?:src|href)=\"([^\"]+)\"")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
)


def make_targets(text: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", text, re.MULTILINE))


def commands(text: str, first: str) -> list[list[str]]:
    """The words of every line of a bash block that starts with `first` (a prompt `$ ` is allowed)."""
    lines = [line.split("#")[0].removeprefix("$ ").split() for block in BASH.findall(text) for line in block.splitlines()]
    return [line for line in lines if line[:1] == [first]]


def cli_problems(text: str) -> list[str]:
    """Subcommands and options of `mmrecipes` in bash blocks that the command line does not have."""
    import typer

    from mmrecipes.cli import app

    known = typer.main.get_command(app).commands
    found = []
    for words in commands(text, "mmrecipes"):
        command = known.get(words[1]) if len(words) > 1 else None
        if command is None:
            found.append(f"mmrecipes {' '.join(words[1:])}: no such command")
            continue
        options = {o for p in command.params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
        found += [
            f"mmrecipes {words[1]} {w}: no such option" for w in words if w.startswith("-") and w.split("=")[0] not in options
        ]
    return found


def anchors(text: str) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Relative links to files or anchors that do not exist."""
    text = page.read_text()
    found = []
    for link in (a or b for a, b in LINK.findall(text)):
        file, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / file if file else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


PAGES = ("README.md", "CONTRIBUTING.md", "results/README.md", "docs/glossary.md")


@pytest.mark.parametrize("page", [ROOT / page for page in PAGES], ids=lambda p: p.name)
def test_links_exist(page):
    assert broken_links(page) == []


def test_make_commands_exist():
    found = [words[1] for words in commands((ROOT / "README.md").read_text(), "make")]
    assert {"tour", "test"} <= set(found)
    assert set(found) <= make_targets((ROOT / "Makefile").read_text())


def test_mmrecipes_commands_exist():
    assert cli_problems((ROOT / "README.md").read_text()) == []


def test_generated_regions_are_in_step():
    assert readme.stale() == []


def test_the_repository_is_named_in_one_way():
    slug = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "notebooks").glob("*.ipynb"),
        *(ROOT / "recipes").glob("*.py"),
    ]
    for page in pages:
        hosted = re.findall(r"(?:mybinder\.org/v2/gh|colab\.research\.google\.com/github)/([\w.-]+/[\w.-]+)", page.read_text())
        ours = re.findall(r"github\.com/([\w.-]+/mmrecipes)\b", page.read_text())
        assert {*hosted, *ours} <= {slug}, page.name


# ---- the checks above find what is wrong


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A `title`, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](gone.md) [c](there.md#a-title-here) [d](there.md#nowhere)\n"
        '[e](https://x.org) [f](#no) <img src="no.png">'
    )
    assert broken_links(page) == ["gone.md", "there.md#nowhere", "#no", "no.png"]


def test_wrong_commands_are_found():
    lines = ("mmrecipes tour --model x  # fine", "$ mmrecipes fly", "mmrecipes tour --wings", "mmrecipes", "make tour")
    text = "```bash\n" + "\n".join(lines) + "\n```\nmmrecipes no"
    assert cli_problems(text) == [
        "mmrecipes fly: no such command",
        "mmrecipes tour --wings: no such option",
        "mmrecipes : no such command",
    ]
    assert commands(text, "make") == [["make", "tour"]]
    assert make_targets("A := b\ntour: x\n\ttest: no\n.PHONY: lab\n") == {"tour"}


# ---- what tools/readme.py generates

URL = "https://github.com/some/where"
ENVIRONMENT = {"cpu": "A CPU", "threads": 2, "gpu": None, "date": "2026-11-21T10:00:00+00:00", "commit": "0123456789abcdef+dirty"}
ROWS = [
    {"name": "fp32", "accuracy": {"value": 0.9612, "low": 0.95, "high": 0.97, "n": 600}, "ttft_ms": 12.4, "disk_mb": 21.04},
    {"name": "int2", "accuracy": None, "ttft_ms": 9.6, "disk_mb": None},
]


@pytest.fixture
def project(tmp_path) -> Path:
    """A small repository with a README, a notebook and both results."""
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{URL}"\n')
    (tmp_path / "notebooks").mkdir()
    first = nbformat.v4.new_markdown_cell(
        "# What is | it?\n<!-- begin:badges -->\n<!-- end:badges -->\n\n<!-- begin:cost --><!-- end:cost -->"
    )
    nb = nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell("print('ü')", execution_count=1)])
    nbformat.write(nb, tmp_path / "notebooks" / "00_it.ipynb")
    (tmp_path / "results").mkdir()
    pages = {"README.md": ("badges", "notebooks")}
    pages["results/README.md"] = (
        "adapters",
        "bench",
        "distillation",
        "together",
        "vllm",
        "serve",
        "gpu",
        "resampler",
        "waterfall",
        "growth",
        "parts",
        "larger",
        "largest",
        "shrink",
        "pruning",
        "quantization",
        "results",
        "sizes",
        "training",
    )
    for page, names in pages.items():
        regions = "\n\n".join(f"<!-- begin:{name} -->\nold\n<!-- end:{name} -->" for name in names)
        (tmp_path / page).write_text(f"# Title\n\n{regions}\n\nThe end.\n")
    measured = {"rows": [{"name": "00_it", "seconds": 66, "peak_mb": 912}]}
    (tmp_path / "results" / "notebooks.json").write_text(json.dumps(measured))
    (tmp_path / "results" / "tour.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": ROWS, "notes": ["A note."]}))
    return tmp_path


def test_fill_and_check(project):
    pages = {"README.md", "results/README.md", "notebooks/00_it.ipynb"}
    assert {p.relative_to(project).as_posix() for p in readme.stale(project)} == pages
    for path, text in readme.expected(project).items():
        path.write_text(text)
    assert readme.stale(project) == []
    results = (project / "results" / "README.md").read_text()
    assert "| fp32 | 96.1 [95.0, 97.0] n=600 |" in results
    text = (project / "README.md").read_text()
    assert "old" not in text + results
    assert text.startswith("# Title\n")
    assert text.endswith("The end.\n")
    assert f"({URL.replace('github.com', 'mybinder.org/v2/gh')}/main?urlpath=lab/tree/notebooks/00_it.ipynb)" in text
    assert "(https://colab.research.google.com/github/some/where/blob/main/notebooks/00_it.ipynb)" in text
    assert "| [00_it](notebooks/00_it.ipynb) | What is / it? | 1.1 | 0.9 GB |" in text
    nb = nbformat.read(project / "notebooks" / "00_it.ipynb", as_version=4)
    assert "https://mybinder.org/v2/gh/some/where/main" in nb.cells[0].source
    assert "About 1.1 minutes, 0.9 GB of memory." in nb.cells[0].source
    assert nb.cells[1].source == "print('ü')"
    assert nb.cells[1].execution_count == 1


def test_result_table_shows_what_was_measured():
    lines = readme.result_table({"environment": ENVIRONMENT, "rows": ROWS, "notes": ["A note."]}).splitlines()
    assert lines[0] == "| variant | accuracy, % [95% interval] | time to first token, ms | on disk, MB |"
    assert lines[2] == "| fp32 | 96.1 [95.0, 97.0] n=600 | 12 | 21.0 |"
    assert lines[3] == "| int2 | - | 10 | - |"
    assert lines[5] == "A note."
    assert lines[7] == "Measured on A CPU, 2 threads, 2026-11-21, commit 0123456789 with changes."


def test_bench_table_compares_with_its_first_row():
    row = {"name": "first", "ttft_ms": 2000.0, "tokens_per_s": 10.0, "peak_mb": 1000.0, "disk_mb": 500.0, "error": 0.0}
    fast = row | {"name": "fast", "ttft_ms": 500.0, "tokens_per_s": 45.0, "peak_mb": 250.0, "error": 0.05}
    lines = readme.bench_table({"environment": {"cpu": "a CPU"}, "rounds": 3, "rows": [row, fast]}).splitlines()
    assert lines[2] == "| first | 2,000 (1.0x) | 10.0 (1.0x) | 1,000 (1.00x) | 500 | - |"
    assert lines[3] == "| fast | 500 (4.0x) | 45.0 (4.5x) | 250 (0.25x) | 500 | 5.0% |"
    assert "3 fresh processes" in lines[-1] and "a CPU" in lines[-1]


def test_bench_table_shows_loading_and_notes_where_there_are_any():
    row = {"name": "first", "ttft_ms": 2000.0, "tokens_per_s": 10.0, "peak_mb": 1000.0, "disk_mb": 500.0, "error": 0.0}
    row |= {"load_s": 3.14, "first_s": 5.2, "note": "with two tiles"}
    content = {"environment": {"cpu": "a CPU"}, "rounds": 3, "rows": [row], "notes": ["One has no row."]}
    lines = readme.bench_table(content).splitlines()
    assert lines[0].endswith("| disk MB | load s | load to first token s | logit error |")
    assert lines[2] == "| first | 2,000 (1.0x) | 10.0 (1.0x) | 1,000 (1.00x) | 500 | 3.1 | 5.2 | - |"
    assert lines[4:7] == ["first: with two tiles.", "", "One has no row."]


def test_ours_stand_beside_the_best_peer_whose_logits_are_as_close():
    def row(name, error, ttft, rate):
        times = {"ttft_ms": ttft, "tokens_per_s": rate, "peak_mb": 100.0, "disk_mb": 10.0}
        return {"name": name, "error": error} | times

    rows = [row("fp32", 0.0, 100.0, 10.0), row("rough", 0.3, 10.0, 99.0), row("close", 0.01, 50.0, 20.0)]
    rows += [row("close, another prompt", 0.01, 1.0, 999.0), row("ours: int8", 0.05, 40.0, 15.0)]
    lines = readme.peers_table({"rows": rows}).splitlines()
    assert lines[2] == "| int8 | 1.25x close | 0.75x close | 1.00x fp32 | 1.00x fp32 |"


def test_quantization_table_shows_what_was_measured(project):
    accuracy, change = {"n": 4200}, {"points": -1.24, "low": -1.9, "high": -0.6}
    row = {"accuracy": accuracy, "change": change, "times_smaller": 9.04}
    variants = {"uniform 3 bits": row, "of no interest": row}
    (project / "results" / "plan.json").write_text(json.dumps({"variants": variants}))
    lines = readme.quantization_table(project / "results").splitlines()
    assert "on 4200 questions" in lines[0]
    assert lines[2:] == ["| 3 bits, GPTQ | 9.0x | -1.2 [-1.9, -0.6] |"]


def test_pruning_table_shows_what_was_measured(project):
    row = {"change": {"points": -0.84, "low": -1.3, "high": -0.4, "n": 4200}, "recovery": {"minutes": 8.8}}
    cut = {"variants": {"recovered with its parent": row}, "share cut": {"cut": 0.465}}
    cut["times faster"] = {"cut": {"a question, ONNX Runtime": 1.414, "a question, PyTorch": 1.3}}
    (project / "results" / "structured.json").write_text(json.dumps(cut))
    speed = {"prefill": {"keep 25%, attention, layer 2": {"faster": 2.52}}, "ttft": {"merge 50%": {"faster": 1.5}}}
    (project / "results" / "tokens-speed.json").write_text(json.dumps(speed))
    lines = readme.pruning_table(project / "results").splitlines()
    assert lines[2] == "| the same, trained for 9 minutes | 46% of the parameters | -0.8 [-1.3, -0.4] | 4200 |"
    assert "1.41 times" in lines[-1] and "2.5 times" in lines[-1] and "token 1.5 times" in lines[-1]


def test_distillation_table_shows_what_was_measured(project):
    row = {"change": {"points": -0.74, "low": -1.2, "high": -0.2, "n": 4200}, "minutes": 15.6}
    student = {"variants": {"taught": row, "labels alone": row}, "share": 0.274}
    student["times faster"] = {"a question, ONNX Runtime fp32, 1 thread": 2.11, "a question, PyTorch": 1.5}
    (project / "results" / "student.json").write_text(json.dumps(student))
    dual = {"variants": {"taught": row | {"change": {"text_r1": row["change"]}}}, "share": 0.38}
    (project / "results" / "dual.json").write_text(json.dumps(dual))
    lines = readme.distillation_table(project / "results").splitlines()
    assert lines[2] == "| a student of `mini-vlm`, distilled for 16 minutes | 27% | -0.7 [-1.2, -0.2] | 4200 |"
    assert lines[4].startswith("| a smaller `mini-siglip`") and "| 38% |" in lines[4]
    assert lines[-1].endswith("faster than its teacher: 2.1 times (ONNX Runtime fp32, 1 thread).")
    eyes = {f"{eye}, static": {"ms": {"median": ms}} for eye, ms in (("ShuffleNetV2 1.0x", 2.04), ("teacher", 2.65))}
    answers = {name: timed | {"change": {"points": -1.07}} for name, timed in eyes.items()}
    swap = {"threads": 2, "OpenVINO, 1 thread": eyes, "runtime, OpenVINO": answers}
    (project / "results" / "swap.json").write_text(json.dumps(swap))
    last = readme.distillation_table(project / "results").splitlines()[-1]
    both = "2.0 against 2.6 ms, -1.1 points"
    assert last.endswith(f"in static int8: {both} (OpenVINO, 1 thread); {both} (OpenVINO, 2 threads).")


def test_adapters_table_shows_what_was_learned_and_forgotten(project):
    new, old = {"value": 0.7, "low": 0.67, "high": 0.72, "n": 1200}, {"points": -0.4, "low": -0.8, "high": 0.1, "n": 4200}
    row = {"change": old, "new": {"accuracy": new}}
    made = {"variants": {"before": {"new": {"accuracy": new | {"value": 0.31}}}, "LoRA, new and old": row}}
    (project / "results" / "lora.json").write_text(json.dumps(made))
    lines = readme.adapters_table(project / "results").splitlines()
    assert "of 1200 new questions, 31% before" in lines[0] and len(lines) == 3
    assert lines[2] == "| LoRA, with as many old examples | 70% [67, 72] | -0.4 [-0.8, +0.1] | 4200 |"


def test_nothing_measured_is_said(project):
    for file in ("tour.json", "notebooks.json"):
        (project / "results" / file).unlink()
    texts = readme.expected(project)
    assert "Not measured yet" in texts[project / "results" / "README.md"]
    assert "| What is / it? | - | - |" in texts[project / "README.md"]


def test_each_table_says_on_which_instruction_sets_it_was_measured(project):
    environment = ENVIRONMENT | {"capabilities": ["sse4_2", "avx2", "avx512f", "avx512_vnni", "avx512_bf16"]}
    variants = {"uniform 3 bits": {"change": {"points": -1.0, "low": -2.0, "high": 0.0}, "accuracy": {"n": 10}}}
    (project / "results" / "plan.json").write_text(json.dumps({"environment": environment, "variants": variants}))
    text = readme.expected(project)[project / "results" / "README.md"]
    assert "- [plan.json](plan.json): A CPU, with AVX2 AVX512 VNNI bf16, 2 threads" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin:badges -->", "do not pair up"),
        ("<!-- begin:badges --><!-- begin:results --><!-- end:results --><!-- end:badges -->", "do not pair up"),
        ("<!-- begin:badgers --><!-- end:badgers -->", "no region badgers"),
        (
            "<!-- begin:badges --><!-- end:badges -->",
            "has no region notebooks",
        ),
    ],
)
def test_broken_regions_are_refused(project, text, message):
    (project / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        readme.expected(project)


# ---- one set of versions, everywhere


def test_lock_is_exact_and_names_no_place():
    text = (ROOT / "requirements.lock").read_text()
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9._!]+", line) for line in text.splitlines())
    assert not [name for name in LOCK if name.lower().startswith(("nvidia", "triton", "cuda")) or name == "torchvision"]


def test_lock_is_installed():
    from importlib.metadata import version

    installed = {name: version(name).split("+")[0] for name in LOCK}
    assert installed == LOCK


def test_lock_meets_the_floors():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    locked = {canonicalize_name(name): version for name, version in LOCK.items()}
    extras = PROJECT["optional-dependencies"]
    floors = [
        Requirement(r)
        for r in [*PROJECT["dependencies"], *(r for e in ("deploy", "vllm", "train", "notebooks", "test") for r in extras[e])]
    ]
    assert floors
    for floor in floors:
        assert floor.specifier.contains(locked[canonicalize_name(floor.name)]), floor


def test_binder_agrees_with_the_lock(tmp_path):
    conda = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())["dependencies"]
    assert f"pytorch-cpu={LOCK['torch']}" in conda
    python = next(d.split("=")[1] for d in conda if d.startswith("python="))
    assert tuple(map(int, python.split("."))) >= (3, 11)
    # run postBuild with a pip that only says what it is asked
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/usr/bin/env bash\necho "$@"\nif [[ $* == *" -r "* ]]; then cat "${@: -1}"; fi\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", "binder/postBuild"],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert "--no-deps -r" in lines[0]
    assert lines[-1].endswith("--no-deps --no-build-isolation -e .")
    asked = dict(line.split("==") for line in lines[1:-1] if not line.startswith("#"))
    assert asked.items() <= LOCK.items()
    assert {"transformers", "datasets", "bitsandbytes", "ipywidgets", "matplotlib", "typer", "psutil", "setuptools"} <= set(asked)
    assert not {"torch", "pytest", "nbval", "ruff", "hypothesis", "scipy", "jupyterlab"} & set(asked)


def test_every_name_that_binder_leaves_out_is_in_the_lock():
    left_out = " ".join(re.findall(r'^skip\+?="(.*)"$', (ROOT / "binder" / "postBuild").read_text(), re.MULTILINE)).split()
    assert "torch" in left_out
    assert set(left_out) <= set(LOCK)


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "make test"


def test_hooks_are_what_make_lint_runs():
    plan = subprocess.run(["make", "-n", "-o", ".venv/.installed", "lint"], cwd=ROOT, capture_output=True, text=True, check=True)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert len(hooks) == 5
    assert all(any(line.startswith(hook["entry"]) for line in plan.stdout.splitlines()) for hook in hooks)


def test_make_refuses_an_old_python(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "old-python"  # this interpreter, that takes itself for 3.9
    old.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 9, 1); $2"\n')
    old.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={old}", "tour"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "mmrecipes needs Python 3.11 or newer" in done.stderr
    assert "is 3.9" in done.stderr
    assert not (tmp_path / ".venv").exists()


# ---- the wheel: who has no repository gets models and data too


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy, because setuptools builds inside the source tree
    for folder in ("mmrecipes", "data"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "requirements.lock"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("mmrecipes-*.whl")))


def test_wheel_carries_code_models_and_data(wheel):
    files = set(wheel.namelist())
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mmrecipes").rglob("*") if p.suffix in (".py", ".html")}
    data = {p for p in (ROOT / "data").rglob("*") if p.is_file() and (p.suffix == ".parquet" or "models" in p.parts)}
    assert any("test" in p.name for p in data)
    assert any(p.name == "model.safetensors" for p in data)
    want = code | {f"mmrecipes/_data/{p.relative_to(ROOT / 'data').as_posix()}" for p in data}
    assert {f for f in files if ".dist-info/" not in f} == want
    for path in data:
        assert wheel.getinfo(f"mmrecipes/_data/{path.relative_to(ROOT / 'data').as_posix()}").file_size == path.stat().st_size


def test_wheel_says_what_it_is(wheel):
    dist = f"mmrecipes-{PROJECT['version']}.dist-info"
    assert "mmrecipes = mmrecipes.cli:main" in wheel.read(f"{dist}/entry_points.txt").decode()
    text = wheel.read(f"{dist}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in text
    assert recipes.repository() in text
