# Can one tower get smaller without losing the other?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/32_contrastive_distillation.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import tempfile

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

MODEL = os.environ.get("MODEL", "google/siglip-base-patch16-224")  # or a CLIP
PAIRS = [(Image.new("RGB", (224, 224), c), f"a {c} thing") for c in ("red", "green", "blue", "orange")]  # yours; many
STEPS, RATE, OUT = 30, 5e-4, os.environ.get("OUT", os.path.join(tempfile.mkdtemp(), "student"))
teacher, student = (AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval() for _ in range(2))
processor, config = AutoProcessor.from_pretrained(MODEL), student.config
for tower, own in ((student.vision_model, config.vision_config), (student.text_model, config.text_config)):
    tower.encoder.layers = tower.encoder.layers[::2]
    own.num_hidden_layers = len(tower.encoder.layers)
fixed = {"padding": "max_length", "max_length": config.text_config.max_position_embeddings, "truncation": True}
inputs = processor(images=[p for p, _ in PAIRS], text=[t for _, t in PAIRS], return_tensors="pt", **fixed)


def look(model):
    out = model(**inputs)
    image, text = (F.normalize(v, dim=-1) for v in (out.image_embeds, out.text_embeds))
    return image, text, teacher.logit_scale.exp() * image @ text.T


with torch.no_grad():
    wanted, stepper, losses = look(teacher), torch.optim.AdamW(student.parameters(), lr=RATE), []
for _ in range(STEPS):
    found = look(student)
    feature = sum(1 - F.cosine_similarity(a, b).mean() for a, b in zip(found[:2], wanted[:2], strict=True))
    ways = ((found[2].log_softmax(d), wanted[2].log_softmax(d)) for d in (0, 1))
    affinity = sum(F.kl_div(a, b, log_target=True, reduction="sum") / len(PAIRS) for a, b in ways)
    losses.append(feature.item())
    (10 * feature + affinity).backward()
    stepper.step()
    stepper.zero_grad()
student.save_pretrained(OUT)
processor.save_pretrained(OUT)
print(f"half the layers; one minus the cosine with the old vectors: {losses[0]:.3f} -> {losses[-1]:.3f}")
