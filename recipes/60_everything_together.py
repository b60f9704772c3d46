# In which order do pruning, distillation and quantization go, and what do they give together?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/60_everything_together.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
KEEP = 0.5  # share of each FFN's neurons that stays
STEPS = 20  # take some hundreds, of new images each
BATCH = 2
RATE = 1e-5
GROUP = 32  # inputs that share a 4-bit scale, where they divide into such groups


def load(model_id):
    try:
        models = [AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32) for _ in range(2)]
        return AutoProcessor.from_pretrained(model_id), *models
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None


def prepare(processor, first):
    images = []
    for rng in map(random.Random, range(first, first + BATCH)):
        images.append([Image.new("RGB", (512, 512), "gainsboro")])
        ImageDraw.Draw(images[-1][0]).ellipse((70, 90, rng.randint(150, 480), 400), fill=rng.choice(("red", "blue", "green")))
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the object?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=images, text=[prompt] * BATCH, return_tensors="pt")


def divergence(student, teacher, batch):  # of what both predict at the last 8 tokens of each prompt
    wanted = teacher(**batch).logits[:, -8:].log_softmax(-1).detach()
    return (wanted.exp() * (wanted - student(**batch).logits[:, -8:].log_softmax(-1))).sum(-1).mean()


def cut_ffn_(ffn):
    into = [ffn.gate_proj, ffn.up_proj] if hasattr(ffn, "gate_proj") else [ffn.fc1]
    out = ffn.down_proj if hasattr(ffn, "down_proj") else ffn.fc2
    score = sum(layer.weight.square().sum(1) for layer in into) * out.weight.square().sum(0)
    kept = score.topk(int(KEEP * len(score))).indices.sort().values
    for layer in into:
        layer.weight = torch.nn.Parameter(layer.weight[kept].detach())
        layer.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias[kept].detach())
    out.weight = torch.nn.Parameter(out.weight[:, kept].detach())


def main(model_id):
    processor, teacher, student = load(model_id)
    teacher.requires_grad_(False)

    def report(step):
        nats = sum(divergence(student, teacher, prepare(processor, seed)).item() for seed in range(10_000, 10_012, BATCH)) / 6
        print(f"{step:28s} {student.num_parameters():,} parameters, {nats:.4f} nats (KL divergence) from the original")

    for name, module in list(student.named_modules()):
        if (hasattr(module, "down_proj") or hasattr(module, "fc2")) and "resampler" not in name:
            cut_ffn_(module)
    report("P: cut")
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0)
    for step in range(STEPS):
        divergence(student, teacher, prepare(processor, step * BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    report(f"D: {STEPS} steps")
    for module in student.modules():
        if isinstance(module, torch.nn.Linear) and module is not student.get_output_embeddings():
            weight = module.weight.data
            rows = weight.reshape(-1, GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1])
            scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / 7.5  # store it, and the levels in 4 bits each
            module.weight.data = ((rows / scale).round().clamp(-8, 7) * scale).view_as(weight)
    report("Q: 4 bits")


if __name__ == "__main__":
    main(MODEL)
