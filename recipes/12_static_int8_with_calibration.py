# What range will an activation have?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/12_static_int8_with_calibration.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
VISION_ENCODERS = ("vision_model", "vision_tower", "visual")  # what model families call their vision encoder
IMAGES = 8  # to calibrate on, and others to evaluate; they must look like those of production


def load(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None
    return processor, model.eval()


def draw_scene(seed):  # three coloured circles: put your own images here
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "white")
    for x in (10, 180, 350):
        y = rng.randint(0, 380)
        ImageDraw.Draw(image).ellipse((x, y, x + 130, y + 130), fill=tuple(rng.choices(range(256), k=3)))
    return image


@torch.no_grad()
def encode(processor, model, encoder, images, layers=(), pre_hook=None):
    """The vision encoder's features of all images, with `pre_hook` on the layers' inputs."""
    features = []
    hooks = [layer.register_forward_pre_hook(pre_hook) for layer in layers]
    hooks.append(encoder.register_forward_hook(lambda module, args, output: features.append(output.last_hidden_state)))
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True)
    for image in images:
        model(**processor(images=[image], text=[prompt], return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return torch.stack(features)


def quantize_weight_(layer):  # symmetric, a scale per output channel
    weight = layer.weight.data.flatten(1)
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    layer.weight.data = ((weight / scale).round() * scale).view_as(layer.weight)


def observe(layer, args):  # calibration: the largest magnitude among the layer's inputs so far
    layer.largest = torch.maximum(layer.largest, args[0].abs().max())


def quantize_input(layer, args):  # to the range that was found, for good: what lies outside is clipped
    return (args[0] / layer.largest * 127).round().clamp(-127, 127) / 127 * layer.largest


def main(model_id):
    processor, model = load(model_id)
    encoder = next((m for name, m in model.named_modules() if name.split(".")[-1] in VISION_ENCODERS), None)
    if encoder is None:
        raise SystemExit(f"MODEL={model_id!r} has no module called one of {VISION_ENCODERS}: add its vision encoder's name there")
    layers = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    evaluation = [draw_scene(seed) for seed in range(IMAGES)]
    noise = [Image.frombytes("RGB", (512, 512), random.Random(seed).randbytes(3 * 512 * 512)) for seed in range(IMAGES)]
    reference = encode(processor, model, encoder, evaluation)
    for layer in layers:
        quantize_weight_(layer)
    for name, images in {"noise": noise, "scenes": [draw_scene(1000 + seed) for seed in range(IMAGES)]}.items():
        for layer in layers:
            layer.largest = torch.tensor(1e-12)
        encode(processor, model, encoder, images, layers, observe)
        change = encode(processor, model, encoder, evaluation, layers, quantize_input) - reference
        print(f"calibrated on {name}: features move by {change.norm() / reference.norm():.3f} (relative, n = {IMAGES} images)")


if __name__ == "__main__":
    main(MODEL)
