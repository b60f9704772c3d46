"""Every recipe is its notebook's, and runs alone: without mmrecipes, on a house model and on a LLaVA or CLIP it never saw."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import nbformat
import pytest

import programs
import recipes
from paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run_alone(recipe: Path, model: Path | str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the file in a process of its own that cannot import mmrecipes, in `folder`, with MODEL set."""
    encoder = ROOT / "data" / "models" / "mini-cnn"  # for recipes that need one beside MODEL
    env = os.environ | {"MODEL": str(model), "ENCODER": str(encoder), "PYTHONPATH": "", "MPLBACKEND": "agg"}
    return programs.run([recipe], folder, env, blocked="mmrecipes")


def test_every_notebook_has_a_recipe():
    assert RECIPES
    assert [p.stem for p in RECIPES] == [p.stem for p in NOTEBOOKS]


def test_recipes_are_what_their_notebooks_say():
    assert recipes.stale() == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("whose", ["house", "foreign"])
def test_recipe_runs_alone(recipe, whose, tmp_path, request):
    kind = "vlm" if "AutoModelForImageTextToText" in recipe.read_text() else "dual"
    done = run_alone(recipe, request.getfixturevalue(f"{whose}_{kind}"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the recipe prints nothing: its reader cannot see what it did"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("wrong", ["missing", "empty"])
def test_a_wrong_model_ends_in_one_line_that_names_it(recipe, wrong, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run_alone(recipe, tmp_path / wrong, tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"MODEL={str(tmp_path / wrong)!r}" in done.stderr.splitlines()[-1]


# ---- the tests' own tools


def test_mmrecipes_is_blocked(tmp_path):
    script = tmp_path / "cheat.py"
    for line in ("import mmrecipes", "from mmrecipes import models", "import mmrecipes.models"):
        script.write_text(line)
        done = run_alone(script, "", tmp_path)
        assert done.returncode == 1
        assert "mmrecipes" in done.stderr.splitlines()[-1]


def test_run_alone_passes_the_model(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text('import os\n\nMODEL = os.environ.get("MODEL", "none")\nprint(MODEL)')
    assert run_alone(script, "here", tmp_path).stdout == "here\n"


def test_foreign_vlm_answers_through_the_auto_classes(foreign_vlm):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(foreign_vlm)
    model = AutoModelForImageTextToText.from_pretrained(foreign_vlm)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the star?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[[Image.new("RGB", (50, 40))]], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert "Idefics" not in type(processor).__name__
    assert out.shape == (1, inputs["input_ids"].shape[1] + 4)


def write_notebook(root: Path, name: str, *sources: str) -> Path:
    """A notebook under `root` with a title and code cells, each tagged recipe; with a pyproject.toml beside it."""
    (root / "notebooks").mkdir(exist_ok=True)
    (root / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/some/where/"\n')
    cells = [nbformat.v4.new_markdown_cell("# Can `this` be small?\n\nText.")]
    cells += [nbformat.v4.new_code_cell(source, metadata={"tags": ["recipe"]}) for source in sources]
    path = root / "notebooks" / name
    nbformat.write(nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell("print('not the recipe')")]), path)
    return path


def test_extract_write_and_check(tmp_path):
    path = write_notebook(tmp_path, "10_small.ipynb", "import os\n\nprint(os.name)\n")
    assert recipes.stale(tmp_path) == ["recipes/10_small.py is not what its notebook says: run `make recipes`"]
    (written,) = recipes.write(tmp_path)
    text = written.read_text()
    assert text.startswith("# Can this be small?\n")
    assert "https://github.com/some/where/blob/main/notebooks/10_small.ipynb\n" in text
    assert "Apache-2.0" in text
    assert text.endswith("\n\nimport os\n\nprint(os.name)\n")
    assert recipes.stale(tmp_path) == []
    written.write_text(text.replace("os.name", "os.sep"))
    assert len(recipes.stale(tmp_path)) == 1
    path.rename(path.with_name("11_other.ipynb"))
    assert "recipes/10_small.py has no notebook: run `make recipes`" in recipes.stale(tmp_path)
    recipes.write(tmp_path)
    assert [p.name for p in (tmp_path / "recipes").iterdir()] == ["11_other.py"]


@pytest.mark.parametrize("sources", [(), ("a = 1", "b = 2")])
def test_extract_wants_exactly_one_recipe(tmp_path, sources):
    path = write_notebook(tmp_path, "10_small.ipynb", *sources)
    with pytest.raises(ValueError, match=f"10_small.ipynb: {len(sources)} code cells are tagged recipe"):
        recipes.extract(path, "https://github.com/some/where")
