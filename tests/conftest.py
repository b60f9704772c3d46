"""What several test files share. Nothing here skips: a test whose house model is missing fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from paths import ROOT


@pytest.fixture(scope="session")
def house_vlm() -> Path:
    """The directory of the committed `mini-vlm`."""
    path = ROOT / "data" / "models" / "mini-vlm"
    assert (path / "config.json").is_file(), "data/models/mini-vlm is missing: `mmrecipes train mini-vlm` makes it"
    return path


@pytest.fixture(scope="session")
def foreign_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random LLaVA with its real processor: a model that nothing of ours was fitted to."""
    import tiny

    model = tiny.llava(layers=2)  # recipes drop layers
    path = tmp_path_factory.mktemp("models") / "llava"
    model.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def house_dual() -> Path:
    """The directory of the committed `mini-siglip`."""
    path = ROOT / "data" / "models" / "mini-siglip"
    assert (path / "config.json").is_file(), "data/models/mini-siglip is missing: `mmrecipes train mini-siglip` makes it"
    return path


@pytest.fixture(scope="session")
def foreign_dual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random CLIP with its real processor, for recipes on dual encoders."""
    import tiny

    return tiny.save(tiny.clip_128(layers=2), tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def house_exports(house_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`mini-vlm` exported for a runtime in a precision, once a session: the directory, to read. Copy it to change it."""
    from mmrecipes import export, models

    folder = tmp_path_factory.mktemp("exports")

    @functools.cache
    def exported(runtime: str, precision: str) -> Path:
        return export.export(models.load(house_vlm), folder / f"{runtime}-{precision}", runtime, precision)

    return exported


@pytest.fixture(scope="session")
def batched_exports(house_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`mini-vlm`, or a tiny random model of a family, exported with batches for a runtime, once a session."""
    from mmrecipes import export, models
    from tests import families

    folder = tmp_path_factory.mktemp("batched")

    @functools.cache
    def exported(name: str, runtime: str = "onnx") -> Path:
        model = models.load(house_vlm) if name == "mini-vlm" else families.load(name)
        return export.export(model, folder / f"{name}-{runtime}", runtime, batches=True)

    return exported
