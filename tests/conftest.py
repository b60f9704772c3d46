"""What several test files share. Nothing here skips: a test whose house model is missing fails."""

from __future__ import annotations

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
