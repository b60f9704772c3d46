"""Vision-language models in the files that optimum and transformers.js keep them in, answering as exports of ours do.

Three graphs: an image's pixels to visual tokens, token ids to embeddings, embeddings after a KV cache to logits. For ONNX they
are vision_encoder, embed_tokens and decoder_model_merged, beside the configs or in onnx/, the cache an input and an output; for
OpenVINO openvino_{vision_embeddings, text_embeddings, language}_model.xml, the cache the last graph's own state.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmrecipes.errors import UserError, one_line
from mmrecipes.inference.backends import onnx_session
from mmrecipes.inference.embeds import OPENVINO_FILES, Embeds, OptimumOpenVino
from mmrecipes.inference.exported import Exported, generation_rules

FILES = {
    "onnx": ("vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"),
    "openvino": OPENVINO_FILES,
}
FAMILIES = {"llava": "tiles", "idefics3": "idefics3", "smolvlm": "idefics3"}  # model types whose graphs are read, so far
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


def find_graphs(folder: Path) -> tuple[str, Path] | None:
    """The runtime, and the directory that holds the graphs: `folder` or its onnx/. None, too, where a checkpoint lies beside."""
    for place in () if any(folder.glob("*.safetensors")) else (folder, folder / "onnx"):
        for runtime, pattern in (("onnx", "decoder*.onnx"), ("onnx", "vision_encoder*.onnx"), ("openvino", "openvino_*.xml")):
            if any(place.glob(pattern)):
                return runtime, place
    return None


def load_optimum(folder: str | Path, threads: int | None = None) -> Exported:
    """The model that optimum wrote to `folder`, ready to answer. Raises UserError where files are missing or of a kind that is
    not read yet; ImportError where the runtime is missing."""
    from transformers import AutoConfig, GenerationConfig

    folder = Path(folder).expanduser()
    runtime, graphs = find_graphs(folder) or (None, folder)
    wanted = FILES[runtime] if runtime else sum(FILES.values(), ())
    if missing := [name for name in wanted if not (graphs / name).is_file()]:
        raise UserError(f"{graphs}: optimum's layout without {missing[0]}; give a directory with {', '.join(wanted)}")
    home = graphs if (graphs / "config.json").is_file() else graphs.parent
    try:
        config = AutoConfig.from_pretrained(home)
        known = (home / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(home) if known else GenerationConfig.from_model_config(config)
    except Exception as e:  # whatever a broken file makes the library raise
        raise UserError(f"{home}: config.json cannot be read ({one_line(e, 80)}); copy the configs of the model here") from e
    if config.model_type not in FAMILIES:
        raise UserError(f"{graphs}: a {config.model_type} in optimum's layout, of which only {', '.join(FAMILIES)} are read yet")
    stops = generation.eos_token_id or config.get_text_config().eos_token_id
    manifest = {
        "runtime": runtime,
        "precision": dict.fromkeys(("vision", "language"), "as written"),
        "family": FAMILIES[config.model_type],
        "settings": {},
        "generation": generation_rules(generation),
        "image_token_id": config.image_token_id,
        "eos_token_ids": sorted({stops} if isinstance(stops, int) else stops or ()),
        "max_length": config.get_text_config().max_position_embeddings,
    }
    kind = {"onnx": OptimumOnnx, "openvino": OptimumOpenVino}[runtime]
    return Exported(home, manifest, threads, lambda *_: kind(graphs, config, threads))


class OptimumOnnx(Embeds):
    """The three graphs in ONNX Runtime; the cache goes from each run's outputs (present.*) to the next one's inputs."""

    def __init__(self, folder: Path, config: Any, threads: int | None):
        super().__init__(config)
        self.vision, self.words, self.decoder = (onnx_session(folder / name, threads or 0) for name in FILES["onnx"])
        text, given = config.get_text_config(), {i.name: i for i in self.decoder.get_inputs()}
        known = ("inputs_embeds", "attention_mask", "position_ids", "use_cache_branch", "num_logits_to_keep")
        if unknown := [name for name in given if name not in known and not name.startswith("past_key_values.")]:
            raise UserError(f"{folder / FILES['onnx'][2]}: takes {unknown[0]}, which is not known here; give another export")
        heads = text.num_key_value_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        past = [name for name in given if name.startswith("past_key_values.")]
        self.empty = {name: np.zeros((1, heads[0], 0, heads[1]), TYPES[given[name].type]) for name in past}
        self.outputs = ["logits", *(name.replace("past_key_values.", "present.", 1) for name in past)]
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.past = self.empty

    def encode(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Visual tokens (..., D) of one image or tile, {"pixel_values": (1, 3, H, W)}, without padding."""
        pixels = inputs["pixel_values"]
        if self.config.model_type != "llava":  # images of a conversation are an axis of their own
            pixels = pixels[None]
        real = np.ones((*pixels.shape[:-3], *pixels.shape[-2:]), np.bool_)
        return self._run(self.vision, {"pixel_values": pixels, "pixel_attention_mask": real})[0].astype(np.float32)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self._run(self.words, {"input_ids": ids})[0]

    def decode(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        more = {"use_cache_branch": np.array([self.past is not self.empty]), "num_logits_to_keep": np.array(1)}
        logits, *past = self._run(self.decoder, feeds | more | self.past, self.outputs)
        self.past = dict(zip(self.empty, past, strict=True))
        return logits

    def crop(self, length: int) -> None:
        super().crop(length)
        self.past = {name: x[:, :, :length] for name, x in self.past.items()}

    def _run(self, session, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
        """What `session` makes of those of `feeds` that it takes, in the types that it takes."""
        return session.run(outputs, {i.name: feeds[i.name].astype(TYPES[i.type], copy=False) for i in session.get_inputs()})
