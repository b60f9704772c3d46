"""Processors are the same with torchvision as without it: `make torchvision` tries a real one, this one that cannot compute."""

import pytest

import torchvision_check
from tests.families import CHATS, DUALS

USELESS = '''
def __getattr__(name):
    """Any name, for an import; what is called ends the program."""
    if name.startswith("__"):
        raise AttributeError(name)

    def __new__(cls, *args, **kwargs):
        raise RuntimeError(f"torchvision's {name} was called")

    return type(name, (), {"__new__": __new__})
'''
MODES = """
import enum

InterpolationMode = enum.Enum("InterpolationMode", "NEAREST NEAREST_EXACT BOX BILINEAR HAMMING BICUBIC LANCZOS")
"""


@pytest.fixture(scope="module")
def useless(tmp_path_factory):
    """A folder with a torchvision that transformers imports and prefers, and that can change no image."""
    folder = tmp_path_factory.mktemp("with")
    files = {"": '__version__ = "0.28.0"', "io": USELESS, "transforms": MODES, "transforms/functional": USELESS}
    files |= {"transforms/v2": "", "transforms/v2/functional": USELESS + MODES}
    for name, code in files.items():
        module = folder / "torchvision" / name
        module.mkdir()
        (module / "__init__.py").write_text(code)
    return folder


def test_images_are_resized_by_pillow_whether_or_not_torchvision_is_there(useless):
    assert torchvision_check.differences(useless, list(CHATS + DUALS)) == []


def test_lfm2_vl_is_resized_by_torchvision_for_want_of_another(useless):
    """And the check above would end like this, were another family's images."""
    with pytest.raises(SystemExit, match="torchvision's resize was called"):
        torchvision_check.differences(useless, ["lfm2_vl"])
