# Int8 without calibration: who makes it fast?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/11_dynamic_int8.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
import time
import warnings
from copy import deepcopy

import torch
from PIL import Image, ImageDraw
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
SCENES = 9  # images, with a question each
MAX_SIMULATION_GAP = 0.15  # relative; rounding ties explain less, a broken int8 kernel causes more


def load(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None
    return processor, model.eval()


def prepare(processor, seed):  # a circle and a square, and a question: put your own images and questions here
    rng = random.Random(seed)
    circle, square = rng.sample(["red", "blue", "green", "yellow"], 2)
    top = rng.randint(40, 330)
    image = Image.new("RGB", (512, 512), "gainsboro")
    ImageDraw.Draw(image).ellipse((70, top, 210, top + 140), fill=circle)
    ImageDraw.Draw(image).rectangle((300, 370 - top, 430, 500 - top), fill=square)
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[image], text=[prompt], return_tensors="pt")


def round_input(layer, args):  # as the int8 kernels do it: to 7 bits, one scale per tensor
    x = args[0]
    scale = ((x.max().clamp(min=0) - x.min().clamp(max=0)) / 127).clamp(min=1e-12)
    return ((x / scale).round() * scale, *args[1:])


def simulate_(model, linears):
    """The int8 arithmetic in floats, in place: what the int8 model has to agree with."""
    for layer in map(model.get_submodule, linears):
        scale = layer.weight.data.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127.5
        layer.weight.data = (layer.weight.data / scale).round().clamp(-128, 127) * scale
        layer.register_forward_pre_hook(round_input)
    return model


@torch.inference_mode()
def run(model, batches):
    """Logits of each answer's first token, (questions, vocabulary), and the mean milliseconds of a prefill."""
    model(**batches[0].to(model.dtype))  # warm-up
    start = time.perf_counter()
    logits = torch.stack([model(**inputs.to(model.dtype)).logits[0, -1].float() for inputs in batches])
    return logits, 1000 * (time.perf_counter() - start) / len(batches)


def main(model_id):
    warnings.filterwarnings("ignore", message="(?s).*(torch.ao.quantization|quantize_per_tensor|reduce_range).*")  # deprecated
    processor, model = load(model_id)
    batches = [prepare(processor, seed) for seed in range(SCENES)]
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    int8 = quantize_dynamic(model, dict.fromkeys(linears, per_channel_dynamic_qconfig))
    variants = {"fp32": model, "int8": int8, "simulated": simulate_(deepcopy(model), linears), "bf16": deepcopy(model).bfloat16()}
    logits = {}
    for name, variant in variants.items():
        logits[name], milliseconds = run(variant, batches)
        same = (logits[name].argmax(-1) == logits["fp32"].argmax(-1)).sum()
        print(f"{name:9s} {milliseconds:6.0f} ms per prefill, first answer token as fp32 in {same} of {len(batches)} questions")
    gap = (logits["int8"] - logits["simulated"]).norm() / logits["simulated"].norm()
    print(f"int8 is {gap:.3f} (relative) from its simulation:", "as it should" if gap < MAX_SIMULATION_GAP else "BROKEN")


if __name__ == "__main__":
    main(MODEL)
