# Why is my quantized model slower, and how could I have known?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/01_measure_before_you_shrink.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import statistics
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
VISION_ENCODERS = ("vision_model", "vision_tower", "visual")  # what model families call their vision encoder
QUESTION = "What colour is the circle?"
WARMUP_ROUNDS = 1  # the first round pays for memory and caches
REPEATS = 5  # the median of them is printed
DECODED_TOKENS = 8


def load(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None
    return processor, model.eval()


def find_vision_encoder(model):
    for name, module in model.named_modules():
        if name.split(".")[-1] in VISION_ENCODERS:
            return module
    raise SystemExit(f"MODEL={MODEL!r} has no module called one of {VISION_ENCODERS}: add its vision encoder's name there")


def prepare(processor):
    """The model's inputs for one image and one question. Put your own here: their sizes decide the times."""
    image = Image.new("RGB", (512, 512), "gainsboro")
    draw = ImageDraw.Draw(image)
    draw.ellipse((70, 90, 210, 230), fill="red")
    draw.rectangle((300, 280, 430, 410), fill="blue")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(images=[image], text=[prompt], return_tensors="pt")


@torch.inference_mode()
def time_stages(model, inputs, vision_clock):
    """Seconds of the vision encoder, of the rest of the prefill, and of decoding one token with the KV cache."""
    start = time.perf_counter()
    output = model(**inputs, use_cache=True)
    prefilled = time.perf_counter()
    for _ in range(DECODED_TOKENS):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    decoded = time.perf_counter()
    vision = vision_clock["end"] - vision_clock["start"]
    return vision, prefilled - start - vision, (decoded - prefilled) / DECODED_TOKENS


def main(model_id):
    processor, model = load(model_id)
    inputs = prepare(processor)
    vision_clock = {}
    vision_encoder = find_vision_encoder(model)
    vision_encoder.register_forward_pre_hook(lambda *_: vision_clock.update(start=time.perf_counter()))
    vision_encoder.register_forward_hook(lambda *_: vision_clock.update(end=time.perf_counter()))
    rounds = [time_stages(model, inputs, vision_clock) for _ in range(WARMUP_ROUNDS + REPEATS)][WARMUP_ROUNDS:]
    print(f"median of {REPEATS} rounds, {inputs['input_ids'].shape[1]} prompt tokens, {torch.get_num_threads()} threads, fp32")
    for stage, seconds in zip(("vision encoder", "prefill", "decode, per token"), zip(*rounds, strict=True), strict=True):
        print(f"{stage:18s} {1000 * statistics.median(seconds):8.1f} ms")


if __name__ == "__main__":
    main(MODEL)
