# At real size: where does the time go, and how near is it to the bound?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/54_where_the_time_goes.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import statistics
import time

import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
DTYPE = torch.float32  # torch.bfloat16 where the CPU has instructions for it
QUESTION = "What is in this image?"
ROUNDS = 5


def median_s(run):
    run()  # the first chooses kernels and touches pages
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def load(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=DTYPE)
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None
    return model.eval(), processor


def prompt(processor, image):
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(turns, **options)
    return {k: v.to(DTYPE) if v.is_floating_point() else v for k, v in inputs.items()}


def machine():
    """GFLOP/s of a square matmul, GB/s of reading 256 MB."""
    a = torch.randn(1024, 1024, dtype=DTYPE)
    data = torch.ones(64 * 2**20)
    return 2 * 1024**3 / median_s(lambda: a @ a) / 1e9, data.nbytes / median_s(data.sum) / 1e9


def share(name, flop, read, seconds, peak, bandwidth):
    compute = flop / peak / 1e9
    memory = read / bandwidth / 1e9
    kind = "compute" if compute > memory else "memory"
    least = max(compute, memory)
    print(f"{name:14s} {1e3 * seconds:8.1f} ms, bound {1e3 * least:8.1f} ms ({kind}), {least / seconds:.0%} of it reached")


def main(model_id):
    image = Image.new("RGB", (512, 512), "lightgrey")
    ImageDraw.Draw(image).rectangle((150, 150, 350, 350), fill="navy")
    model, processor = load(model_id)
    inputs = prompt(processor, image)
    peak, bandwidth = machine()
    print(f"this machine: {peak:.0f} GFLOP/s, {bandwidth:.1f} GB/s on {torch.get_num_threads()} threads; medians of {ROUNDS}")
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counted:
            model(**inputs, use_cache=True, logits_to_keep=1)
        first = median_s(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
        few, many = (
            median_s(lambda n=n: model.generate(**inputs, do_sample=False, min_new_tokens=n, max_new_tokens=n)) for n in (2, 18)
        )
    token = (many - few) / 16
    read = sum(p.nbytes for p in {*model.get_decoder().parameters(), *model.lm_head.parameters()})
    share("first token", counted.get_total_flops(), sum(p.nbytes for p in model.parameters()), first, peak, bandwidth)
    share("further token", 2 * read / DTYPE.itemsize, read, token, peak, bandwidth)


if __name__ == "__main__":
    main(MODEL)
