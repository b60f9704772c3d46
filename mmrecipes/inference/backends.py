"""The graphs of an exported model in each runtime: `encode` images, then `step` through tokens with the KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmrecipes.inference.session import session_options
from mmrecipes.quiet import native_stderr


class OnnxGraphs:
    """vision.onnx and language.onnx in ONNX Runtime. The KV cache stays in the runtime's memory from step to step."""

    def __init__(self, folder: Path, precision: dict[str, str], threads: int | None):
        import onnxruntime as ort

        options = session_options(threads or 0)
        cpu = ["CPUExecutionProvider"]
        self.vision, self.language = (
            ort.InferenceSession(str(folder / f"{part}.onnx"), options, providers=cpu) for part in ("vision", "language")
        )
        self.value = ort.OrtValue.ortvalue_from_numpy
        _, features, *past = self.language.get_inputs()
        self.past_names = [i.name for i in past]
        self.outputs = ["logits", *(name.replace("input.", "output.", 1) for name in self.past_names)]
        heads, width = (int(past[0].shape[axis]) for axis in (1, 3))
        self.empty = np.zeros((1, heads, 0, width), np.float32)
        self.nothing = np.zeros((1, int(features.shape[1])), np.float32)
        self.reset()

    def reset(self) -> None:
        self.past = [self.value(self.empty)] * len(self.past_names)

    def look(self, pixel_values: np.ndarray) -> np.ndarray:
        """Visual tokens (T, D) of all pictures (or tiles), one after the other."""
        name = self.vision.get_inputs()[0].name
        found = [self.vision.run(None, {name: picture[None].astype(np.float32)})[0] for picture in pixel_values]
        return np.concatenate([each.reshape(-1, each.shape[-1]) for each in found])

    def step(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        """Logits (V) after `ids` (1, T), which the cache then holds, too."""
        values = {"input_ids": ids.astype(np.int64), "image_features": self.nothing if features is None else features}
        feeds = {name: self.value(value) for name, value in values.items()}
        feeds |= dict(zip(self.past_names, self.past, strict=True))
        logits, *self.past = self.language.run_with_ort_values(self.outputs, feeds)
        return logits.numpy()[0, -1]


class OpenVinoGraphs:
    """vision.xml and language.xml in OpenVINO on the CPU. The KV cache is the language graph's own state."""

    def __init__(self, folder: Path, precision: dict[str, str], threads: int | None):
        import openvino as ov

        core, found = ov.Core(), {}
        for part in ("vision", "language"):
            # else it computes in bf16 wherever the CPU has instructions for it, whatever the file says
            hint = "bf16" if precision[part] == "bf16" else "f32"
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
            settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
            found[part] = core.compile_model(folder / f"{part}.xml", "CPU", settings).create_infer_request()
        self.vision, self.language = found["vision"], found["language"]
        shape = self.language.get_compiled_model().input("image_features").get_partial_shape()
        self.nothing = np.zeros((1, shape[1].get_length() if shape[1].is_static else 1), np.float32)
        self.reset()

    def reset(self) -> None:
        self.language.reset_state()

    def look(self, pixel_values: np.ndarray) -> np.ndarray:
        """Visual tokens (T, D) of all pictures (or tiles), one after the other."""
        found = [self.vision.infer([picture[None].astype(np.float32)])[0] for picture in pixel_values]
        return np.concatenate([each.reshape(-1, each.shape[-1]) for each in found])

    def step(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        """Logits (V) after `ids` (1, T), which the state then holds, too."""
        feeds = {"input_ids": ids.astype(np.int64), "image_features": self.nothing if features is None else features}
        return self.language.infer(feeds | {"beam_idx": np.zeros(1, np.int32)})["logits"][0, -1]


class ExecutorchGraphs:
    """vision.pte and language.pte in ExecuTorch. The KV cache is the language program's own memory."""

    def __init__(self, folder: Path, precision: dict[str, str], threads: int | None):
        with native_stderr():  # it reports on the CPU of a phone that it does not find
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - the kernels of its attention
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            if threads:
                portable_lib._unsafe_reset_threadpool(threads)
            self.programs = [Runtime.get().load_program(folder / f"{part}.pte") for part in ("vision", "language")]
            self.vision, self.language = (program.load_method("forward") for program in self.programs)
        shape = self.language.metadata.input_tensor_meta(1).sizes()
        self.nothing = np.zeros((1, shape[1]), np.float32)
        self.reset()

    def reset(self) -> None:
        self.before = 0

    def look(self, pixel_values: np.ndarray) -> np.ndarray:
        """Visual tokens (T, D) of all pictures (or tiles), one after the other."""
        found = [self._run(self.vision, picture[None].astype(np.float32)) for picture in pixel_values]
        return np.concatenate([each.reshape(-1, each.shape[-1]) for each in found])

    def step(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        """Logits (V) after `ids` (1, T), which the cache then holds, too."""
        features = self.nothing if features is None else features
        logits = self._run(self.language, ids.astype(np.int64), features, np.array([self.before]))
        self.before += ids.shape[1]
        return logits[0, -1]

    def _run(self, method: Any, *inputs: np.ndarray) -> np.ndarray:
        import torch

        with native_stderr():
            return method.execute([torch.from_numpy(np.ascontiguousarray(each)) for each in inputs])[0].clone().numpy()
