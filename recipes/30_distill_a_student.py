# What can a teacher give that labels cannot?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/30_distill_a_student.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import tempfile

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
PICTURES = [Image.new("RGB", (256, 256), c) for c in ("red", "green", "blue", "orange")]  # yours; many, a few at a time
QUESTION, STEPS, RATE, TEMPERATURE = "What colour is this?", 20, 5e-4, 2.0
OUT = os.environ.get("OUT", os.path.join(tempfile.mkdtemp(), "student"))

teacher, student = (AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval() for _ in range(2))
processor = AutoProcessor.from_pretrained(MODEL)
decoder = student.get_decoder()
decoder.layers = torch.nn.ModuleList(decoder.layers[::2])
for i, layer in enumerate(decoder.layers):
    layer.self_attn.layer_idx = i  # its place in the cache
student.config.get_text_config().num_hidden_layers = decoder.config.num_hidden_layers = len(decoder.layers)
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
text = processor.apply_chat_template(turn, add_generation_prompt=True)
batch = processor(images=[[p] for p in PICTURES], text=[text] * len(PICTURES), padding=True, return_tensors="pt")
with torch.no_grad():
    said = teacher.generate(**batch, max_new_tokens=8, do_sample=False)
    keep = said.shape[1] - batch["input_ids"].shape[1] + 1  # the answers, and the word before
    batch["input_ids"], batch["attention_mask"] = said, (said != processor.tokenizer.pad_token_id).long()
    wanted = (teacher(**batch, logits_to_keep=keep).logits / TEMPERATURE).log_softmax(-1)
stepper, losses = torch.optim.AdamW(student.parameters(), lr=RATE), []
for _ in range(STEPS):
    found = (student(**batch, logits_to_keep=keep).logits / TEMPERATURE).log_softmax(-1)
    loss = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean() * TEMPERATURE**2
    losses.append(loss.item())
    loss.backward()
    stepper.step()
    stepper.zero_grad()
student.save_pretrained(OUT)
processor.save_pretrained(OUT)
print(f"{len(decoder.layers)} layers; distance from the teacher: {losses[0]:.3f} -> {losses[-1]:.3f}")
