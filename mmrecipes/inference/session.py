"""ONNX Runtime sessions on the CPU, and their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmrecipes.errors import UserError, one_line, require


def session_options(threads: int):  # -> onnxruntime.SessionOptions
    """Settings of an ONNX Runtime session: `threads` (0: one for each physical core), which rest once a run is done.

    By default they spin on for tens of milliseconds, ready for the next run, and take the cores from whatever else computes
    in the process: eager PyTorch between two runs, or the variant that is timed next.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


# ---- run


def onnx_session(graph: str | Path):  # -> onnxruntime.InferenceSession
    """`graph` ready to run on the CPU, with as many threads as PyTorch uses; UserError where there is no such file."""
    require("onnxruntime")
    import onnxruntime as ort

    if not Path(graph).is_file():
        raise UserError(f"session: no file {graph}; make it with onnx.attached.export_parts or onnx.quantize.dynamic_int8")
    options = session_options(torch.get_num_threads())
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def vision_session(path: str | Path, threads: int | None = None, as_written: bool = False) -> Callable[[Tensor], Tensor]:
    """A function that runs an ONNX file on the CPU: pictures in, its first output out.

    With `as_written`, without this CPU's int8 kernels: each quantize and dequantize as the file says, products in float. Slow,
    and what the file means; kernels that saturate (see `saturates`) may give something else.
    """
    import onnxruntime as ort

    options = session_options(threads or torch.get_num_threads())
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        run = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's own kinds, without a common parent
        raise UserError(f"{path}: ONNX Runtime cannot load it ({one_line(e)}); export it again") from e
    name = run.get_inputs()[0].name
    return lambda pictures: torch.from_numpy(run.run(None, {name: pictures.numpy()})[0])
