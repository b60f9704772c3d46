"""The graphs of an exported model in each runtime: `encode` an image, then `step` through tokens with the KV cache."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mmrecipes.errors import UserError, one_line, require
from mmrecipes.quiet import native_stderr

PARTS = ("vision", "language")
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}  # that run the files


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


class Positions:
    """Counts the positions of tokens, where a graph asks for them (M-RoPE): on from the largest of the prompt."""

    def __init__(self, wanted: bool):
        self.wanted, self.next = wanted, 0

    def reset(self) -> None:
        self.next = 0

    def of(self, ids: np.ndarray, positions: np.ndarray | None) -> dict[str, np.ndarray]:
        """The graph's further inputs for tokens (1, T) at `positions`, else at those that come next."""
        if not self.wanted:
            return {}
        if positions is None:
            positions = np.broadcast_to(self.next + np.arange(ids.shape[1]), (3, *ids.shape))
        self.next = int(positions.max()) + 1
        return {"position_ids": np.ascontiguousarray(positions, np.int64)}


class OnnxGraphs:
    """vision.onnx and language.onnx in ONNX Runtime. The KV cache stays in the runtime's memory from step to step."""

    def __init__(self, folder: Path, precision: dict[str, str], threads: int | None):
        from onnxruntime import OrtValue

        self.vision, self.language = (onnx_session(folder / f"{part}.onnx", threads or 0) for part in PARTS)
        self.value = OrtValue.ortvalue_from_numpy
        given = {i.name: i for i in self.language.get_inputs()}
        features, past = given["image_features"], [i for name, i in given.items() if name.startswith("input.")]
        self.past_names, self.positions = [i.name for i in past], Positions("position_ids" in given)
        self.outputs = ["logits", *(name.replace("input.", "output.", 1) for name in self.past_names)]
        self.empty = np.zeros((1, int(past[0].shape[1]), 0, int(past[0].shape[3])), np.float32)  # (1, heads, T, head_dim)
        self.no_image = np.zeros((1, int(features.shape[1])), np.float32)
        self.reset()

    def reset(self) -> None:
        self.past = [self.value(self.empty)] * len(self.past_names)
        self.positions.reset()

    def encode(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Visual tokens (..., D) of one image or tile, as the model's family prepares it: {"pixel_values": (1, 3, H, W)}, ..."""
        return self.vision.run(None, dict(inputs))[0]

    def step(self, ids: np.ndarray, features: np.ndarray | None = None, positions: np.ndarray | None = None) -> np.ndarray:
        """Logits (V) after `ids` (1, T), which the cache then holds, too. `positions` (3, 1, T): where M-RoPE puts a prompt."""
        given = {"input_ids": ids.astype(np.int64), "image_features": self.no_image if features is None else features}
        feeds = {name: self.value(x) for name, x in (given | self.positions.of(ids, positions)).items()}
        feeds |= dict(zip(self.past_names, self.past, strict=True))
        logits, *self.past = self.language.run_with_ort_values(self.outputs, feeds)
        return logits.numpy()[0, -1]


class OpenVinoGraphs:
    """As `OnnxGraphs`, with vision.xml and language.xml in OpenVINO. The KV cache is the language graph's own state."""

    def __init__(self, folder: Path, precision: dict[str, str], threads: int | None):
        import openvino as ov

        core, requests = ov.Core(), {}
        for part in PARTS:
            # a hint, too, where it is f32: else it computes in bf16 wherever the CPU can, whatever the file says
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if precision[part] == "bf16" else "f32"}
            settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
            requests[part] = core.compile_model(folder / f"{part}.xml", "CPU", settings).create_infer_request()
        self.vision, self.language = requests["vision"], requests["language"]
        width = self.language.get_compiled_model().input("image_features").get_partial_shape()[1]
        self.no_image = np.zeros((1, width.get_length() if width.is_static else 1), np.float32)
        names = {name for port in self.language.get_compiled_model().inputs for name in port.get_names()}
        self.positions = Positions("position_ids" in names)

    def reset(self) -> None:
        self.language.reset_state()
        self.positions.reset()

    def encode(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        # in order: some graphs keep no names
        return self.vision.infer([*inputs.values()] if len(inputs) == 1 else dict(inputs))[0]

    def step(self, ids: np.ndarray, features: np.ndarray | None = None, positions: np.ndarray | None = None) -> np.ndarray:
        feeds = {"input_ids": ids.astype(np.int64), "image_features": self.no_image if features is None else features}
        feeds |= self.positions.of(ids, positions)
        return self.language.infer(feeds | {"beam_idx": np.zeros(1, np.int32)})["logits"][0, -1]


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

    def _run(self, method, *inputs: np.ndarray) -> np.ndarray:
        import torch

        with native_stderr():
            return method.execute([torch.from_numpy(np.ascontiguousarray(each)) for each in inputs])[0].clone().numpy()


GRAPHS = {"onnx": OnnxGraphs, "openvino": OpenVinoGraphs, "executorch": ExecutorchGraphs}
