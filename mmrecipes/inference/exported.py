"""An exported vision-language model, answering from ONNX Runtime or OpenVINO: no PyTorch model, no code of the source.

`export.export` writes such a directory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrecipes.errors import ParityError, UserError, one_line
from mmrecipes.inference.backends import ExecutorchGraphs, OnnxGraphs, OpenVinoGraphs

MANIFEST = "export.json"


FORMAT = 1  # of the manifest; a newer one is refused


PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}


def load_exported(folder: str | Path, threads: int | None = None, check: bool = True) -> Exported:
    """The model that `export` wrote to `folder`, ready to answer. `threads` of the runtime: by default all physical cores.

    With `check`, the files must be those that were exported (SHA-256). Raises UserError for anything else.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    if check:
        for name, digest in manifest["sha256"].items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path}: missing, though {MANIFEST} names it; export the model again")
            if sha256(path) != digest:
                raise UserError(f"{path}: not the file that was exported (truncated or changed); export the model again")
    return Exported(folder, manifest, threads)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give the one that was exported to")
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST}, so not an exported model; make one with mmrecipes.export.export")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise UserError(f"{folder}: exported by a newer mmrecipes (format {manifest['format']}); upgrade, or export it again")
        _ = [manifest[key] for key in ("image_token_id", "stop", "longest")]
        _ = [manifest["precision"][part] for part in ("vision", "language")], manifest["sha256"].items()
        if manifest["runtime"] not in PACKAGES:
            raise UserError(f"{folder}: exported for {manifest['runtime']!r}; expected one of {', '.join(PACKAGES)}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not readable ({one_line(e, 80)}); export the model again") from e
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Exported:
    """Answers like the model it came from, greedily. `generate` and `stream` take pictures and a text or messages."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None):
        package = PACKAGES[manifest["runtime"]]
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed; get it with: pip install 'mmrecipes[deploy]'")
        from transformers import AutoProcessor

        self.folder, self.manifest = folder, manifest
        self.processor = AutoProcessor.from_pretrained(folder)
        graphs = {"onnx": OnnxGraphs, "openvino": OpenVinoGraphs, "executorch": ExecutorchGraphs}[manifest["runtime"]]
        try:
            self.graphs = graphs(folder, manifest["precision"], threads)
        except Exception as e:  # the runtimes' own kinds, without a common parent
            raise UserError(f"{folder}: {package} cannot load it ({one_line(e)}); export the model again") from e

    def generate(self, images: Any, text: str | Sequence[dict], max_new_tokens: int = 64) -> str:
        """The answer. `images`: None, a picture (PIL, path) or a list; `text`: a question, or messages as a chat template
        takes them, with an {"type": "image"} for each picture."""
        return "".join(self.stream(images, text, max_new_tokens)).strip()

    def stream(self, images: Any, text: str | Sequence[dict], max_new_tokens: int = 64) -> Iterator[str]:
        """The answer, piece by piece as its words are found."""
        tokenizer, ids, said = self.processor.tokenizer, [], ""
        for token in self.tokens(self.inputs(images, text), max_new_tokens):
            ids.append(token)
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            if not whole.endswith("\ufffd"):  # a character may need more than one token
                yield whole[len(said) :]
                said = whole
        if ids and len(whole) > len(said):  # it stopped in the middle of a character
            yield whole[len(said) :]

    def tokens(self, inputs: dict[str, np.ndarray], max_new_tokens: int) -> Iterator[int]:
        """Token ids, the likeliest each time, until the model stops, `max_new_tokens` are found or it has no room for more."""
        logits = self.prefill(inputs)
        room = self.manifest["longest"] - inputs["input_ids"].shape[1] + 1  # the last one found needs no place
        max_new_tokens = min(max_new_tokens, room)
        for i in range(max_new_tokens):
            if not np.isfinite(logits).all():
                raise ParityError("the model's logits are not finite: it is broken, not lossy; export it again")
            token = int(logits.argmax())
            if token in self.manifest["stop"]:
                return
            yield token
            if i + 1 < max_new_tokens:
                logits = self.graphs.step(np.array([[token]]))

    def prefill(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Logits (V) of the first new token; the cache then holds the prompt."""
        ids = inputs["input_ids"]
        self.graphs.reset()
        pixels = inputs.get("pixel_values")
        features = None if pixels is None else self.graphs.look(pixels.reshape(-1, *pixels.shape[-3:]))
        expected, found = int((ids == self.manifest["image_token_id"]).sum()), 0 if features is None else len(features)
        if expected != found:
            raise UserError(
                f"{expected} places for visual tokens in the text, and {found} of them: an image is missing or too many"
            )
        return self.graphs.step(ids, features)

    def inputs(self, images: Any, text: str | Sequence[dict]) -> dict[str, np.ndarray]:
        """What the processor makes of one conversation: input_ids (1, T), pixel_values; UserError where it does not fit."""
        from mmrecipes.models.images import load_image

        pictures = [] if images is None else [load_image(p) for p in (images if isinstance(images, list | tuple) else [images])]
        if isinstance(text, str):
            content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]
            text = [{"role": "user", "content": content}]
        if not isinstance(text, list | tuple) or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in text):
            raise UserError(f"text: {text!r:.80}; expected a question, or a list of messages with a role and a content each")
        places = sum(part["type"] == "image" for turn in text for part in turn["content"] if isinstance(part, dict))
        if places != len(pictures):
            raise UserError(f"{len(pictures)} pictures, and {places} places for them in the messages: give as many")
        prompt = self.processor.apply_chat_template(text, add_generation_prompt=True)
        found = self.processor(text=[prompt], images=[pictures] if pictures else None, return_tensors="np")
        if not np.asarray(found.get("pixel_attention_mask", 1)).all():
            raise UserError(
                "a picture is padded, and the exported tower takes whole ones of its own size: resize the picture to it"
            )
        longest = self.manifest["longest"]
        if found["input_ids"].shape[1] >= longest:
            raise UserError(f"the prompt has {found['input_ids'].shape[1]} tokens, and the model takes {longest}: shorten it")
        return dict(found)
