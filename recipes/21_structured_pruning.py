# Which parts of a model can go, and is what is left faster?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/21_structured_pruning.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import tempfile

import torch
import torch_pruning as tp
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
KEEP = 0.75  # share of each FFN's columns that stays
OUT = os.environ.get("OUT", os.path.join(tempfile.mkdtemp(), "thin"))

model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(MODEL)
before = sum(p.numel() for p in model.parameters())
for mlp in [m for m in model.modules() if hasattr(m, "down_proj") or hasattr(m, "fc2")]:
    first, out = (mlp.up_proj, mlp.down_proj) if hasattr(mlp, "down_proj") else (mlp.fc1, mlp.fc2)
    graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=torch.randn(1, 2, first.in_features))
    group = graph.get_pruning_group(first, tp.prune_linear_out_channels, list(range(first.out_features)))
    scores = tp.importance.GroupMagnitudeImportance(p=2)(group)  # what belongs together is scored together
    gone = scores.argsort()[: int((1 - KEEP) * len(scores))].tolist()
    graph.get_pruning_group(first, tp.prune_linear_out_channels, gone).prune()
config = model.config
for part in (config.vision_config, config.get_text_config()):
    part.intermediate_size -= int((1 - KEEP) * part.intermediate_size)
model.save_pretrained(OUT)
processor.save_pretrained(OUT)

thin, info = AutoModelForImageTextToText.from_pretrained(OUT, dtype=torch.float32, output_loading_info=True)
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
text = processor.apply_chat_template(turn, add_generation_prompt=True)
batch = processor(images=[Image.new("RGB", (512, 512), "teal")], text=[text], return_tensors="pt")
with torch.no_grad():
    same = torch.allclose(thin.eval()(**batch).logits, model(**batch).logits, atol=1e-4)
assert same and not info["missing_keys"] and not info["mismatched_keys"]
print(f"{before:,} -> {sum(p.numel() for p in thin.parameters()):,} parameters in {os.path.basename(OUT)}")
