# Why is a VLM trained in stages, and can I train one at home?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/02_train_your_own_vlm.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
LIGHTS = {"red": "stop", "orange": "wait", "green": "go"}  # what it has not been taught
PAIRS = [(Image.new("RGB", (256, 256), c), "What does this light say?", says) for c, says in LIGHTS.items()]
CONNECTORS = ("connector", "multi_modal_projector", "merger")  # what model families call it
STEPS, RATE = 24, 1e-3

processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
connector = next(m for n, m in model.named_modules() if n.split(".")[-1] in CONNECTORS)
model.requires_grad_(False)
connector.requires_grad_(True)


def example(picture, question, answer):
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=[picture], text=[f"{prompt} {answer}"], return_tensors="pt")
    told = len(processor.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
    labels = inputs["input_ids"].clone()
    labels[:, :-told] = -100  # only the answer is learned
    return inputs, labels


optimizer = torch.optim.AdamW(connector.parameters(), lr=RATE)
for step in range(STEPS):
    inputs, labels = example(*PAIRS[step % len(PAIRS)])
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % len(PAIRS) == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")
