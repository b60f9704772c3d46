"""llama.cpp in the bench: runs in .venv-peers, which `make peers` builds and where there is no PyTorch. bench.py calls it.

    peers.py write FOLDER HOW     the checkpoint's files in one quantization (gguf_files.py)
    peers.py run FOLDER HOW       a row, on the prompt and the tokens that reference.json holds

HOW is q8_0, q4_0 or q4_k_m, and how the prompt is read:

    q4_0               our prompt; llama.cpp's own vision encoder makes the visual tokens, of one tile
    q4_0-two-tiles     the prompt that mtmd makes: of one picture of 512 px, an overview and a tile that shows the same
    q4_0-our-tokens    our prompt, and PyTorch's visual tokens: no vision encoder runs
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

CONTEXT = 512  # tokens of KV cache: what its model allows by default would take 190 MB
MARKER = "<__media__>"  # where mtmd puts the image
NOTES = {
    "": "left alone, mtmd shows the image twice (overview and one tile); here once, in the prompt that all others get",
    "two-tiles": "mtmd's own prompt, which shows the image twice (overview and one tile): the error is that of another prompt",
    "our-tokens": "PyTorch's visual tokens, so TTFT is the prompt alone, without the vision encoder",
}


class LlamaCpp:
    """A language model, and its vision encoder if `vision`, ready to run on the CPU."""

    def __init__(self, folder: Path, threads: int, vision: bool):
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.api, self.mtmd, self.vision = llama_cpp, mtmd_cpp, None
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library calls it as long as it lives
        llama_cpp.llama_log_set(self.quiet, None)
        mtmd_cpp.mtmd_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(folder / "model.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = CONTEXT
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"{folder}: llama.cpp cannot load model.gguf")
        if vision:
            options = mtmd_cpp.mtmd_context_params_default()
            options.use_gpu, options.warmup, options.n_threads = False, False, threads
            self.vision = mtmd_cpp.mtmd_init_from_file(str(folder / "vision.gguf").encode(), self.model, options)
            if not self.vision:
                raise RuntimeError(f"{folder}: llama.cpp cannot load vision.gguf")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.width, self.tokens = llama_cpp.llama_model_n_embd(self.model), llama_cpp.llama_vocab_n_tokens(vocabulary)

    def forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def read(self, ids: list[int], places: np.ndarray | None = None) -> None:
        """Token ids, behind what was read before, or at `places` (T)."""
        array = (self.api.llama_token * len(ids))(*ids)
        self._decode(self.api.llama_batch_get_one(array, len(ids)), places)

    def read_embeddings(self, embeddings: np.ndarray, places: np.ndarray | None = None) -> None:
        """Visual tokens (N, D), float32, behind what was read before, or at `places` (4, N), of M-RoPE."""
        pointer = np.ascontiguousarray(embeddings).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._decode(self.api.llama_batch(n_tokens=len(embeddings), embd=pointer), places)

    def _decode(self, batch, places: np.ndarray | None) -> None:
        if places is not None:
            places = np.ascontiguousarray(places, np.int32)
            batch.pos = places.ctypes.data_as(ctypes.POINTER(self.api.llama_pos))
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def logits(self) -> np.ndarray:
        """Of the token that follows all that was read, (V), float32."""
        found = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(found, (self.tokens,)).copy()

    def chunks(self, prompt: str, image: np.ndarray) -> list:
        """mtmd's parts of `prompt`, with image (H, W, 3), uint8, in place of its marker: tokens, and tiles ready to encode."""
        mtmd, data = self.mtmd, np.ascontiguousarray(image)
        pixels = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels)
        chunks, raw = mtmd.mtmd_input_chunks_init(), prompt.encode()
        text = mtmd.mtmd_input_text(text=raw, text_len=len(raw), add_special=False, parse_special=True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if code := mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), bitmaps, 1):
            raise RuntimeError(f"mtmd_tokenize returned {code}")
        return [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]

    def is_image(self, chunk) -> bool:
        return self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE

    def token_ids(self, chunk) -> list[int]:
        count = ctypes.c_size_t()
        found = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return found[: count.value]

    def encode(self, chunk) -> np.ndarray:
        """Visual tokens (N, D) of a tile."""
        if code := self.mtmd.mtmd_encode_chunk(self.vision, chunk):
            raise RuntimeError(f"mtmd_encode_chunk returned {code}")
        shape = (self.mtmd.mtmd_input_chunk_get_n_tokens(chunk), self.width)
        return np.ctypeslib.as_array(self.mtmd.mtmd_get_output_embd(self.vision), shape)


def prompt_parts(model: LlamaCpp, reference: dict, image: np.ndarray, way: str) -> list[tuple]:
    """What a prefill reads in turn: token ids, or a function that makes visual tokens; each with its places, or None."""
    if way == "two-tiles":
        chunks = model.chunks(reference["prompt"].replace("<image>", MARKER), image)
        return [((lambda c=c: model.encode(c)) if model.is_image(c) else model.token_ids(c), None) for c in chunks]
    ids, place = reference["prompt_ids"], reference["image_token_id"]
    first, after = ids.index(place), len(ids) - ids[::-1].index(place)
    if way == "our-tokens":
        visual = np.array(reference["visual_tokens"], np.float32)
        parts = [ids[:first], lambda: visual, ids[after:]]
    else:
        overview = [c for c in model.chunks(MARKER, image) if model.is_image(c)][-1]  # behind the tiles
        parts = [ids[:first], lambda: model.encode(overview), ids[after:]]
    if reference["positions"] is None:
        return [(part, None) for part in parts]
    places = np.array(reference["positions"])  # (3, T): time, row, column; llama.cpp wants a fourth for images
    seen = np.concatenate([places[:, first:after], np.zeros((1, after - first), int)])
    return list(zip(parts, (places[0, :first], seen, places[0, after:]), strict=True))


def calls(model: LlamaCpp, parts: list[tuple]) -> tuple[Callable, Callable]:
    last = parts[-1][1]
    following: dict[str, int] = {}

    def prefill() -> np.ndarray:
        model.forget()
        for part, places in parts:
            if callable(part):
                model.read_embeddings(part(), places)
            else:
                model.read(part, places)
        following["place"] = 0 if last is None else int(last[-1]) + 1
        return model.logits()

    def step(token: int) -> np.ndarray:
        model.read([token], None if last is None else np.array([following["place"]]))
        following["place"] += 1
        return model.logits()

    return prefill, step


def run(folder: Path, how: str) -> dict:
    """A row of the bench, with a note on what was read."""
    from bench_row import ROOT, THREADS, WORK, measured
    from PIL import Image

    sys.path.insert(0, str(ROOT))  # mmrecipes is not installed there
    reference, way = json.loads((WORK / "reference.json").read_text()), how.partition("-")[2]
    image = np.asarray(Image.open(WORK / "picture.png").convert("RGB"))

    def prepared(model: LlamaCpp) -> tuple[Callable, Callable]:
        return calls(model, prompt_parts(model, reference, image, way))

    row = measured(lambda: LlamaCpp(folder, THREADS, way != "our-tokens"), prepared, folder, reference["tokens"])
    types = (folder / "types.txt").read_text()
    read = "the prompt that all others get, with its places" if reference["positions"] else NOTES[way]
    return row | {"note": f"{read}; matrices of the language model: {types}"}


def main(command: str, place: str, how: str) -> None:
    if command == "write":
        import gguf_files
        from bench_row import CHECKPOINT

        types = gguf_files.write(CHECKPOINT, Path(place), how)
        (Path(place) / "types.txt").write_text(types)  # last: whoever finds it has all files
    else:
        print("\n\n" + json.dumps(run(Path(place), how)))


if __name__ == "__main__":
    main(*sys.argv[1:])
