# How does a compiler learn what to run in int8?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/17_pt2e_and_explicit_quantization.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
import tempfile
import warnings
from logging import WARNING, disable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor

MODEL = os.environ.get("MODEL", "google/siglip-base-patch16-224")  # or a CLIP
CALIBRATION = range(16)  # seeds of drawn scenes; put images of your production in their place
TEST = range(1000, 1008)  # other scenes
OUT = Path(os.environ.get("OUT", tempfile.mkdtemp()))  # where vision-int8.onnx goes


class VisionEncoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.vision = model.vision_model

    def forward(self, pixel_values):
        return self.vision(pixel_values=pixel_values).last_hidden_state


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (256, 256), "lightgrey")
    for left in (10, 95, 180):
        ImageDraw.Draw(image).ellipse((left, left, left + 60, left + 60), tuple(rng.choices(range(256), k=3)))
    return image


def features(path, pixels):
    """Of each image (1, tokens, width), each Q and DQ computed as the file says: the kernels of some CPUs saturate."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [session.run(None, {"pixel_values": image[None]})[0] for image in pixels]


def main():
    disable(WARNING)  # remarks of the exporter and of the quantizer
    warnings.filterwarnings("ignore", message="(?s).*LeafSpec.*")
    try:
        encoder = VisionEncoder(AutoModel.from_pretrained(MODEL, dtype=torch.float32)).eval()
        processor = AutoProcessor.from_pretrained(MODEL).image_processor
    except (ImportError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a CLIP or SigLIP model ({reason})") from None
    pixels = processor([draw_scene(seed) for seed in CALIBRATION], return_tensors="np")["pixel_values"]
    test = processor([draw_scene(seed) for seed in TEST], return_tensors="np")["pixel_values"]
    floats, ready, int8 = (str(OUT / f"vision-{kind}.onnx") for kind in ("fp32", "ready", "int8"))
    example = {"pixel_values": torch.from_numpy(pixels[:1])}
    torch.onnx.export(encoder, kwargs=example, dynamo=True, verbose=False).save(floats)
    quant_pre_process(floats, ready, skip_symbolic_shape=True)
    rules = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "MatMulConstBOnly": True}
    feeds = iter([{"pixel_values": image[None]} for image in pixels])
    reader = SimpleNamespace(get_next=lambda: next(feeds, None))  # what it asks of a CalibrationDataReader
    quantize_static(ready, int8, reader, op_types_to_quantize=["Conv", "MatMul"], per_channel=True, extra_options=rules)
    graph = onnx.load(int8).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = all(constants[n.input[2]].dtype == np.int8 and not constants[n.input[2]].any() for n in pairs)
    both = zip(features(floats, test), features(int8, test), strict=True)
    moved = [np.linalg.norm(found - wanted) / np.linalg.norm(wanted) for wanted, found in both]
    print(f"{len(pairs)} Q and DQ, int8 without zero points: {zeros}; {os.path.getsize(int8) / 1e6:.1f} MB")
    print(f"features move by {np.mean(moved):.3f} (relative, {min(moved):.3f} to {max(moved):.3f}, n = {len(TEST)} images)")


if __name__ == "__main__":
    main()
