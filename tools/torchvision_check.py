"""Whether processors make the same of a conversation with torchvision as without it: torchvision_check.py FOLDER.

FOLDER holds a torchvision (`make torchvision` installs one outside .venv, which has none). Every family of tests/families.py
goes through `load_processor` twice, in a process that cannot import torchvision and in one that finds it in FOLDER.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ONLY_WITH = ("lfm2_vl",)  # transformers has no image processor for Pillow


def differences(folder: Path, names: list[str]) -> list[str]:
    """What of the families `names` is other with the torchvision in `folder` than without it, a line each."""
    without, found = _processed("", names), _processed(str(folder.resolve()), names)
    lines = []
    for name in names:
        wanted, made = without[name], found[name]
        if name in ONLY_WITH and "torchvision" in wanted.get("refused", "").lower() and "refused" not in made:
            continue
        keys = [key for key in wanted.keys() | made.keys() if wanted.get(key) != made.get(key)]
        lines += [f"{name}, {key}: {wanted.get(key)} without torchvision, {made.get(key)} with it" for key in sorted(keys)]
    return lines


def _processed(folder: str, names: list[str]) -> dict[str, dict[str, str]]:
    """What `_process` says in a fresh process that has the torchvision in `folder`, or none."""
    command = [sys.executable, __file__, "--process", folder, *names]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _process(name: str) -> dict[str, str]:
    """The class of a family's image processor, and a digest of each array that it makes of each conversation."""
    import equality
    import families
    from mmrecipes.errors import UserError
    from mmrecipes.models.messages import conversation
    from mmrecipes.models.processors import load_processor

    try:
        processor = load_processor(families.family_dir(name))
    except UserError as e:
        return {"refused": str(e)}
    found = {"image processor": type(processor.image_processor).__name__}
    for case in equality.cases():
        try:
            if name in families.CHATS or name in ONLY_WITH:
                inputs = conversation(processor, case.images or None, case.messages)
            else:
                inputs = processor(images=equality.drawn(*equality.SHAPES["landscape"]), text=["red"], return_tensors="np")
        except UserError as e:
            inputs = {"refused": str(e)}
        found |= {f"{case.name}, {key}": _digest(value) for key, value in inputs.items()}
    return found


def _digest(value) -> str:
    import numpy as np

    array = np.asarray(value)
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:8]}"


def _import_torchvision(folder: Path) -> None:
    """From `folder`. A wheel for CUDA beside torch for the CPU cannot load its operators, and asks for two of them by name."""
    import torch

    try:
        torch.ops.load_library(str(folder / "torchvision" / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _import_torchvision.library = library  # it ends with its last reference
    sys.path.insert(0, str(folder))
    import torchvision

    assert Path(torchvision.__file__).is_relative_to(folder)


def main() -> int:
    if sys.argv[1] == "--process":
        folder, *names = sys.argv[2:]
        if folder:
            _import_torchvision(Path(folder))
        else:
            sys.modules["torchvision"] = None
        print(json.dumps({name: _process(name) for name in names}))
        return 0
    import families

    lines = differences(Path(sys.argv[1]), list(families.FAMILIES))
    print("\n".join(lines) or f"{len(families.FAMILIES)} families: the same with torchvision as without it")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
