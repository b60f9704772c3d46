# Most of a prompt is picture: how much of it does a question need?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/22_visual_tokens.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
KEEP, LAYER, WORDS, PICTURE, QUESTION = 0.25, 2, 8, Image.new("RGB", (512, 512), "teal"), "What colour is this?"
torch.set_grad_enabled(False)
processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
inputs = processor(images=[PICTURE], text=[processor.apply_chat_template(turn, add_generation_prompt=True)], return_tensors="pt")
language = getattr(model.model, "text_model", None) or model.model.language_model
visual = inputs["input_ids"][0] == model.config.image_token_id
seen = torch.cat(model.get_image_features(**{k: v for k, v in inputs.items() if "pixel" in k}).pooler_output)
x = language.embed_tokens(inputs["input_ids"]).masked_scatter(visual[:, None], seen.flatten(0, -2))
cache, length, drop = DynamicCache(config=language.config), x.shape[1], min(LAYER, len(language.layers) - 1)
positions = torch.arange(length)[None]
for i, block in enumerate(language.layers):
    if i == max(drop - 1, 0):  # what the tokens after the picture look at, in the layer before the drop
        shape, h = (1, length, -1, block.self_attn.head_dim), block.input_layernorm(x)
        q, k = (p(h).view(shape).transpose(1, 2) for p in (block.self_attn.q_proj, block.self_attn.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *language.rotary_emb(x, positions))
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * block.self_attn.scaling
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)[0].mean(0)
        best = scores[visual.nonzero().max() + 1 :, visual].amax(0).topk(max(1, round(KEEP * int(visual.sum())))).indices
    if i == drop:
        kept = torch.cat([(~visual).nonzero()[:, 0], visual.nonzero()[best, 0]]).sort().values
        x, positions = x[:, kept], kept[None]  # in order, with the positions they had
    x = block(x, position_embeddings=language.rotary_emb(x, positions), past_key_values=cache, use_cache=True)
said = [model.lm_head(language.norm(x[:, -1])).argmax(-1)]
for at in range(length, length + WORDS - 1):  # positions go on after the whole prompt
    x, rope = language.embed_tokens(said[-1][None]), language.rotary_emb(x, torch.tensor([[at]]))
    for block in language.layers:
        x = block(x, position_embeddings=rope, past_key_values=cache, use_cache=True)
    said.append(model.lm_head(language.norm(x[:, -1])).argmax(-1))
answer = processor.tokenizer.decode(torch.cat(said)).split(processor.tokenizer.eos_token)[0]
print(f"{len(best)} of {int(visual.sum())} visual tokens: {answer!r}")
