# How little must be trained to learn something new?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/33_recover_with_lora.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
PAINTS = {"teal": "A", "maroon": "H", "olive": "K", "navy": "T"}  # yours: hundreds, and as many of what to keep
EXAMPLES = [(Image.new("RGB", (256, 256), colour), "Which paint is this?", name) for colour, name in PAINTS.items()]
RANK, PASSES, RATE, OUT = 8, 15, 1e-3, os.environ.get("OUT", os.path.join(tempfile.mkdtemp(), "adapted"))

processor, model = AutoProcessor.from_pretrained(MODEL), AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))


def as_batch(picture, question, answer):
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    tail = processor.tokenizer(f" {answer}{processor.tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    batch = processor(images=[picture], text=[f"{prompt} {answer}{processor.tokenizer.eos_token}"], return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -len(tail) :] = batch["input_ids"][0, -len(tail) :]  # only the answer is learned
    return {**batch, "labels": labels}


batches = [as_batch(*e) for e in EXAMPLES]
stepper, right = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE), []
for _ in range(PASSES):
    right.append(0)
    for batch in batches:
        out, wanted = model(**batch), batch["labels"][0, 1:]
        right[-1] += (out.logits[0, :-1].argmax(-1) == wanted)[wanted != -100].all().item()
        out.loss.backward()
        stepper.step()
        stepper.zero_grad()
model.merge_and_unload().save_pretrained(OUT)
processor.save_pretrained(OUT)
print(f"right answers of {len(EXAMPLES)}, pass by pass: {right}")
