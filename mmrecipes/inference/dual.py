"""A dual encoder (CLIP, SigLIP) that `export.export` wrote, comparing images with texts: no PyTorch, no code of the source."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrecipes.errors import ParityError, UserError, one_line, require
from mmrecipes.inference.backends import PACKAGES, PARTS, onnx_session, openvino_request
from mmrecipes.models.images import load_image
from mmrecipes.models.processors import load_processor

BATCH = 32  # images or texts in one run
KEYS = ("max_length", "inputs", "padding", "logit_scale", "logit_bias")  # of the manifest, besides those of every export

Arrays = dict[str, np.ndarray]


def image_inputs(processor: Any, images: Sequence[Image.Image | str | Path]) -> Arrays:
    """What a vision encoder may read of `images`: {"pixel_values": (B, 3, H, W)}; with NaFlex patches, their mask and shapes."""
    return _arrays(processor.image_processor([load_image(image) for image in images], return_tensors="np"))


def text_inputs(processor: Any, texts: Sequence[str], padding: str, longest: int) -> Arrays:
    """What a text encoder may read of `texts`: {"input_ids": (B, T), ...}, cut at `longest` tokens. `padding`: "max_length" for
    models that read their last token, else "longest"."""
    return _arrays(processor(text=[*texts], padding=padding, max_length=longest, truncation=True, return_tensors="np"))


def _arrays(made: Mapping[str, Any]) -> Arrays:
    arrays = {name: np.asarray(value) for name, value in made.items()}
    return {name: x.astype(np.float32 if x.dtype.kind == "f" else np.int64) for name, x in arrays.items()}


class ExportedDual:
    """Unit vectors of images and of texts, and their logits, as of the model it came from."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None):
        package = PACKAGES[manifest["runtime"]]
        require(package)
        self.folder, self.manifest, self.processor = folder, manifest, load_processor(folder)
        try:
            self.encoders = {part: self._encoder(part, threads) for part in PARTS}
        except UserError:
            raise
        except Exception as e:  # the runtimes' own kinds, without a common parent
            raise UserError(f"{folder}: {package} cannot load it ({one_line(e)}); export the model again") from e

    def _encoder(self, part: str, threads: int | None) -> Callable[[Arrays], np.ndarray]:
        if self.manifest["runtime"] == "onnx":
            session = onnx_session(self.folder / f"{part}.onnx", threads or 0)
            return lambda inputs: session.run(None, inputs)[0]
        request = openvino_request(self.folder / f"{part}.xml", self.manifest["precision"][part], threads)
        return lambda inputs: request.infer(inputs)[0].copy()

    def embed_images(self, images: Any) -> np.ndarray:
        """Unit vectors (N, D), float32, of images (PIL, paths), or of one."""
        images = list(images) if isinstance(images, list | tuple) else [images]
        return self._embed("vision", images, lambda some: image_inputs(self.processor, some))

    def embed_texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit vectors (N, D), float32, of texts, or of one; what is too long for the model is cut, as its processor does."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        padding, longest = self.manifest["padding"], self.manifest["max_length"]
        return self._embed("language", texts, lambda some: text_inputs(self.processor, some, padding, longest))

    def similarity(self, images: Any, texts: str | Sequence[str]) -> np.ndarray:
        """Logits (N images, M texts): cosines, scaled and shifted as the model learned it."""
        cosines = self.embed_images(images) @ self.embed_texts(texts).T
        return cosines * self.manifest["logit_scale"] + (self.manifest["logit_bias"] or 0.0)

    def _embed(self, part: str, given: list, prepare: Callable[[list], Arrays]) -> np.ndarray:
        if not given:
            raise UserError(f"{self.folder}: nothing to embed; give one or more images or texts")
        found, names = [], self.manifest["inputs"][part]
        for i in range(0, len(given), BATCH):
            made = prepare(given[i : i + BATCH])
            found.append(self.encoders[part]({name: made[name] for name in names}))
        vectors = np.concatenate(found)
        if not np.isfinite(vectors).all():
            raise ParityError("the model's embeddings are not finite: it is broken, not lossy; export it again")
        return vectors
