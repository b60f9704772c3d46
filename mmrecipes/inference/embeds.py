"""What runs three graphs of a vision-language model: an image to visual tokens, token ids to embeddings, embeddings to logits."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mmrecipes import families

OPENVINO_FILES = tuple(f"openvino_{part}_model.xml" for part in ("vision_embeddings", "text_embeddings", "language"))


class Embeds:
    """What both runtimes do alike: visual tokens take the places of placeholders among the embeddings of tokens."""

    def __init__(self, config: Any):
        self.config, self.seen = config, 0

    def reset(self) -> None:
        self.seen = 0

    def step(self, ids: np.ndarray, features: np.ndarray | None = None, positions: None = None) -> np.ndarray:
        """Logits (V) after `ids` (1, T), which the cache then holds, too."""
        embeds = np.array(self.embed(ids.astype(np.int64)))
        if features is not None:
            embeds[ids == self.config.image_token_id] = features
        places = np.arange(self.seen, self.seen + ids.shape[1])[None]
        self.seen += ids.shape[1]
        feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, self.seen), np.int64), "position_ids": places}
        return np.asarray(self.decode(feeds)[0, -1], np.float32)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.seen = length


class OptimumOpenVino(Embeds):
    """The three graphs in OpenVINO, in float32, the cache, too."""

    def __init__(self, folder: Path, config: Any, threads: int | None):
        import openvino as ov

        super().__init__(config)
        # by default the CPU plugin keeps this cache in 8 bits: from the second token on, logits move by a percent
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        compiled = [ov.Core().compile_model(folder / name, "CPU", settings) for name in OPENVINO_FILES]
        self.vision, self.words, self.language = (each.create_infer_request() for each in compiled)
        names = {name for port in compiled[2].inputs for name in port.get_names()}
        self.taken = names & {"inputs_embeds", "attention_mask", "position_ids", "beam_idx"}

    def reset(self) -> None:
        super().reset()
        self.language.reset_state()

    def encode(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """As `OptimumOnnx.encode`. Idefics3's graph is also told which patches are real, and the position of each."""
        pixels = inputs["pixel_values"]
        if self.config.model_type == "llava":
            return np.array(self.vision.infer([pixels])[0])
        vision = self.config.vision_config
        side, rows, columns = (n // vision.patch_size for n in (vision.image_size, *pixels.shape[-2:]))
        at = [families.idefics2.positions(n, side) for n in (rows, columns)]
        feeds = {"pixel_values": pixels, "patch_attention_mask": np.ones((1, rows, columns), np.bool_)}
        feeds["patch_position_ids"] = (at[0][:, None] * side + at[1]).reshape(1, -1)
        return np.array(self.vision.infer(feeds)[0])

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.words.infer([ids])[0]

    def decode(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        feeds = feeds | {"beam_idx": np.zeros(1, np.int32)}
        return self.language.infer({name: x for name, x in feeds.items() if name in self.taken})["logits"]

    def crop(self, length: int) -> None:
        import openvino as ov

        super().crop(length)
        for state in self.language.query_state():
            state.state = ov.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))


def genai_graphs(folder: Path, precision: Mapping[str, str], threads: int | None) -> OptimumOpenVino:
    """The graphs that `export` wrote for OpenVINO GenAI, without it: one conversation at a time, logits at every step."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return OptimumOpenVino(folder, SimpleNamespace(**config), threads)
