# Can a model that sees be made small without going blind?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/00_start_here.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
import statistics
import time
import warnings

import torch
from PIL import Image, ImageDraw
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
SCENES = 5  # images to ask about, three questions each; replace draw_scene with your own images
COLOURS = ("red", "blue", "green", "yellow")  # colours that any VLM can name
MAX_NEW_TOKENS = 8  # short answers


def load(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None
    return processor, model.eval()


def draw_scene(seed):
    """An image of a circle and a square, and questions about it with their answers."""
    rng = random.Random(seed)
    circle, square, absent = rng.sample(COLOURS, 3)
    top = rng.randint(40, 330)
    image = Image.new("RGB", (512, 512), "gainsboro")
    draw = ImageDraw.Draw(image)
    draw.ellipse((70, top, 210, top + 140), fill=circle)
    draw.rectangle((300, 370 - top, 430, 500 - top), fill=square)
    questions = {"What colour is the circle?": circle, "What colour is the square?": square, f"Is there a {absent} square?": "no"}
    return image, questions


def ask(model, processor, image, question):
    """The answer, and the milliseconds it took."""
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    milliseconds = 1000 * (time.perf_counter() - start)
    answer = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return answer.strip().lower().rstrip("."), milliseconds


def quantize_linears(model):
    """A copy with int8 linear layers, a scale per output channel. The head stays: it may share weights with the embedding."""
    warnings.filterwarnings("ignore", message="(?s).*torch.(ao.)?quanti.*deprecated.*")  # deprecated, still the quickest to try
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    return quantize_dynamic(model, dict.fromkeys(linears, per_channel_dynamic_qconfig))


def main(model_id):
    processor, model = load(model_id)
    variants = {"fp32": model, "int8": quantize_linears(model)}
    drawn = [draw_scene(seed) for seed in range(SCENES)]
    examples = [(image, question, truth) for image, questions in drawn for question, truth in questions.items()]
    for variant in variants.values():
        ask(variant, processor, *examples[0][:2])  # warm-up
    asked = [{n: ask(v, processor, image, question) for n, v in variants.items()} for image, question, _ in examples]
    for name in variants:
        right = sum(truth in a[name][0].split() for (_, _, truth), a in zip(examples, asked, strict=True))
        low, median, high = statistics.quantiles([a[name][1] for a in asked], n=4)
        print(f"{name}: {right} of {len(examples)} right; {median:.0f} ms per answer, quartiles {low:.0f} to {high:.0f}")


if __name__ == "__main__":
    main(MODEL)
