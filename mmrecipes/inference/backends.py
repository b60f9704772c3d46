"""The graphs of an exported model in each runtime: `encode` an image, then `step` through tokens with the KV cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrecipes.errors import UserError, one_line, require
from mmrecipes.inference.embeds import genai_graphs
from mmrecipes.inference.padding import Cache, Places, left_padded, without_padding
from mmrecipes.quiet import native_stderr

if TYPE_CHECKING:
    from onnxruntime import OrtValue

PARTS = ("vision", "language")
PACKAGES = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "executorch": "executorch",
    "openvino-genai": "openvino_genai",
}  # that run the files


def onnx_session(path: str | Path, threads: int = 0, as_written: bool = False):  # -> onnxruntime.InferenceSession
    """The graph at `path` ready to run on the CPU, with so many `threads` (0: one for each physical core).
    Threads rest once a run is done: else they spin on for tens of milliseconds, and take the cores from what is timed next.
    With `as_written`, it computes what the file says, in float: slow, but no int8 kernel saturates (`quantize.saturates`).
    Raises UserError for a file that is missing or cannot be loaded, ImportError where ONNX Runtime is missing.
    """
    require("onnxruntime")
    import onnxruntime as ort

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; make it with export.export or export.onnx.to_onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's own kinds, without a common parent
        raise UserError(f"{path}: ONNX Runtime cannot load it ({one_line(e)}); export it again") from e


class OnnxGraphs:
    """vision.onnx and language.onnx, or the one that `precision` names, in ONNX Runtime. The KV cache stays in its memory from
    step to step; where the graph takes its length, in buffers with room for more, so that a step copies nothing of it."""

    def __init__(self, folder: Path, precision: dict[str, str], threads: int | None):
        from onnxruntime import OrtValue

        sessions = {part: onnx_session(folder / f"{part}.onnx", threads or 0) for part in precision}
        self.vision = sessions.get("vision")
        if "language" not in sessions:
            return
        self.language = sessions["language"]
        self.value = OrtValue.ortvalue_from_numpy
        given = {i.name: i for i in self.language.get_inputs()}
        features, past = given["image_features"], [i for name, i in given.items() if name.startswith("input.")]
        self.past_names, self.places = [i.name for i in past], Places({name: len(i.shape) for name, i in given.items()})
        self.outputs = ["logits", *(name.replace("input.", "output.", 1) for name in self.past_names)]
        # (1, heads, T, head_dim), T = 0; states of fixed size begin with zeros
        self.empty = [np.zeros([1, *(n if isinstance(n, int) else 0 for n in i.shape[1:])], np.float32) for i in past]
        self.grows = [each.shape[2] == 0 for each in self.empty]
        self.no_image = np.zeros((1, int(features.shape[1])), np.float32)
        self.roomy = "past_length" in given
        self.reset()

    def reset(self) -> None:
        self.buffers, self.lengths = self.empty, np.zeros(1, np.int64)  # of the rows
        self.past = [self.value(each) for each in self.empty]
        self.places.reset()

    def encode(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Visual tokens (..., D) of one image or tile, as the model's family prepares it: {"pixel_values": (1, 3, H, W)}, ..."""
        return self.vision.run(None, dict(inputs))[0]

    def step(self, ids: np.ndarray, features: np.ndarray | None = None, positions: np.ndarray | None = None) -> np.ndarray:
        """Logits (V), or (B, V) of a batch, after `ids` (B, T), which the cache then holds, too. `positions` (3, 1, T): where
        M-RoPE puts a prompt."""
        given = {"input_ids": ids.astype(np.int64), "image_features": self.no_image if features is None else features}
        feeds = {name: self.value(x) for name, x in (given | self.places.of(ids, positions)).items()}
        if self.roomy:
            return self._step_in_place(feeds, ids.shape[1])
        feeds |= dict(zip(self.past_names, self.past, strict=True))
        logits, *self.past = self.language.run_with_ort_values(self.outputs, feeds)
        return logits.numpy()[:, -1] if len(ids) > 1 else logits.numpy()[0, -1]

    def _step_in_place(self, feeds: Mapping[str, "OrtValue"], tokens: int) -> np.ndarray:
        """As `step`; the cache is input and output at once, and twice as long where it is full."""
        if self.lengths.max() + tokens > self.buffers[0].shape[2]:
            self._make_room(self.split(range(len(self.lengths))), tokens)
        binding = self.language.io_binding()
        for name, value in (feeds | {"past_length": self.value(self.lengths)}).items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(self.outputs[0])
        for name, out, value in zip(self.past_names, self.outputs[1:], self.past, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(out, value)
        self.language.run_with_iobinding(binding)
        self.lengths = self.lengths + tokens
        logits = binding.get_outputs()[0].numpy()[:, -1]
        return logits if len(logits) > 1 else logits[0]

    def cache(self) -> list[np.ndarray]:
        """Keys and values, (1, heads, T, head_dim) each, of the conversation that was read, and other states of its layers."""
        if self.roomy:
            return [buffer[:, :, : self.lengths.max()].copy() for buffer in self.buffers]
        return [np.array(each.numpy()) for each in self.past]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens; for caches without states of fixed size, which cannot go back."""
        if self.roomy:
            self.lengths = np.array([length])
        else:
            self.past = [self.value(np.ascontiguousarray(each.numpy()[:, :, :length])) for each in self.past]
        self.places.begin([length], [length])

    def batch(self, caches: Sequence[Cache], lengths: Sequence[int], following: Sequence[int]) -> None:
        """Go on with several conversations: their caches, how many tokens those hold, and which positions follow."""
        if self.roomy:
            self.lengths = np.array(lengths)
            self._make_room(caches, 1)
        else:
            self.past = [self.value(np.ascontiguousarray(layer)) for layer in left_padded(caches)]
        self.places.begin(lengths, following)

    def split(self, rows: Sequence[int]) -> list[Cache]:
        """The caches of some rows of a batch, as `batch` takes them; they may be views."""
        if self.roomy:
            return [[buffer[i : i + 1, :, : self.lengths[i]] for buffer in self.buffers] for i in rows]
        return without_padding(self.cache(), self.places.mask, self.grows, rows)

    def _make_room(self, caches: Sequence[Cache], tokens: int) -> None:
        """Buffers that hold the caches of so many rows, and have room for more tokens."""
        longest = int(self.lengths.max())
        shapes = [(len(caches), e.shape[1], max(2 * longest, longest + tokens, 256), e.shape[3]) for e in self.empty]
        buffers = [np.zeros(shape, np.float32) for shape in shapes]
        for i, cache in enumerate(caches):
            for new, kept in zip(buffers, cache, strict=True):
                new[i, :, : self.lengths[i]] = kept[0]
        self.buffers, self.past = buffers, [self.value(each) for each in buffers]  # the same memory


def openvino_request(path: Path, precision: str, threads: int | None):  # -> openvino.InferRequest
    """The graph at `path` ready to run on the CPU, with so many `threads` (None: all), in bf16 only where `precision` says it."""
    import openvino as ov

    # a hint, too, where it is f32: else it computes in bf16 wherever the CPU can, whatever the file says
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    return ov.Core().compile_model(path, "CPU", settings).create_infer_request()


class OpenVinoGraphs:
    """As `OnnxGraphs`, with vision.xml and language.xml in OpenVINO. The KV cache is the language graph's own state."""

    def __init__(self, folder: Path, precision: dict[str, str], threads: int | None):
        requests = {part: openvino_request(folder / f"{part}.xml", precision[part], threads) for part in precision}
        self.vision = requests.get("vision")
        if "language" not in requests:
            return
        self.language = requests["language"]
        width = self.language.get_compiled_model().input("image_features").get_partial_shape()[1]
        self.no_image = np.zeros((1, width.get_length() if width.is_static else 1), np.float32)
        ports = self.language.get_compiled_model().inputs
        self.places = Places({name: len(port.get_partial_shape()) for port in ports for name in port.get_names()})
        self.reset()
        self.grows = [layer.shape[2] == 0 for layer in self.cache()]  # others are states of fixed size

    def reset(self) -> None:
        self.language.reset_state()
        self.places.reset()

    def encode(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        # in order: some graphs keep no names
        return self.vision.infer([*inputs.values()] if len(inputs) == 1 else dict(inputs))[0]

    def step(self, ids: np.ndarray, features: np.ndarray | None = None, positions: np.ndarray | None = None) -> np.ndarray:
        feeds = {"input_ids": ids.astype(np.int64), "image_features": self.no_image if features is None else features}
        feeds |= self.places.of(ids, positions)
        logits = self.language.infer(feeds | {"beam_idx": np.arange(len(ids), dtype=np.int32)})["logits"]
        return logits[:, -1].copy() if len(ids) > 1 else logits[0, -1]

    def cache(self) -> list[np.ndarray]:
        return [state.state.data.copy() for state in self.language.query_state()]

    def crop(self, length: int) -> None:
        import openvino as ov

        for state in self.language.query_state():
            state.state = ov.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self.places.begin([length], [length])

    def batch(self, caches: Sequence[Cache], lengths: Sequence[int], following: Sequence[int]) -> None:
        import openvino as ov

        for state, layer in zip(self.language.query_state(), left_padded(caches), strict=True):
            state.state = ov.Tensor(np.ascontiguousarray(layer))
        self.places.begin(lengths, following)

    def split(self, rows: Sequence[int]) -> list[Cache]:
        return without_padding(self.cache(), self.places.mask, self.grows, rows)


class ExecutorchGraphs:
    """As `OnnxGraphs`, with vision.pte and language.pte in ExecuTorch (its API takes tensors); the program holds the KV cache."""

    def __init__(self, folder: Path, precision: dict[str, str], threads: int | None):
        with native_stderr():  # it reports on the CPU of a phone that it does not find
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - the kernels of its attention
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            if threads:
                portable_lib._unsafe_reset_threadpool(threads)
            self.programs = [Runtime.get().load_program(folder / f"{part}.pte") for part in PARTS]  # methods need them alive
            self.vision, self.language = (program.load_method("forward") for program in self.programs)
        self.no_image = np.zeros((1, self.language.metadata.input_tensor_meta(1).sizes()[1]), np.float32)
        self.reset()

    def reset(self) -> None:
        self.cache_length = 0

    def encode(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._run(self.vision, *inputs.values())

    def step(self, ids: np.ndarray, features: np.ndarray | None = None, positions: None = None) -> np.ndarray:
        features = self.no_image if features is None else features
        logits = self._run(self.language, ids.astype(np.int64), features, np.array([self.cache_length]))
        self.cache_length += ids.shape[1]
        return logits[0, -1]

    def crop(self, length: int) -> None:
        self.cache_length = length

    def _run(self, method, *inputs: np.ndarray) -> np.ndarray:
        import torch

        with native_stderr():
            return method.execute([torch.from_numpy(np.ascontiguousarray(each)) for each in inputs])[0].clone().numpy()


GRAPHS = {"onnx": OnnxGraphs, "openvino": OpenVinoGraphs, "executorch": ExecutorchGraphs, "openvino-genai": genai_graphs}


def runtimes(runtime: str | Mapping[str, str]) -> dict[str, str]:
    """Which runtime runs each part, from what a manifest says: one for both, or {"vision": ..., "language": ...}.
    >>> runtimes("onnx")
    {'vision': 'onnx', 'language': 'onnx'}
    """
    return dict.fromkeys(PARTS, runtime) if isinstance(runtime, str) else dict(runtime)


def load_graphs(folder: Path, manifest: Mapping[str, Any], threads: int | None) -> Any:
    """What runs the files in `folder`: a GRAPHS of one runtime, or of the language model's with the vision encoder of another."""
    by_part, precision = runtimes(manifest["runtime"]), manifest["precision"]
    if len(set(by_part.values())) == 1:
        return GRAPHS[by_part["language"]](folder, precision, threads)
    vision, language = (GRAPHS[by_part[part]](folder, {part: precision[part]}, threads) for part in PARTS)
    language.encode = vision.encode
    return language
