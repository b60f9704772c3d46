# Most of a prompt is picture: how much of it does a question need?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/22_visual_tokens.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")  # its language model must be Llama-like
KEEP = 0.25  # share of the visual tokens that stay
LAYER = 1  # its attention ranks the visual tokens; it and the layers after it run without the others
NEW_TOKENS = 8  # at most, per answer
TEST = range(24)  # seeds of drawn scenes; put your own images and questions in their place


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
        if model.get_decoder().config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
            raise ValueError(f"its language model is a {model.get_decoder().config.model_type}, not Llama-like")
        return model, AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "lightgrey")
    colours = rng.sample(("red", "orange", "yellow", "green", "blue", "purple", "black"), 3)
    for left, colour in zip((20, 190, 360), colours, strict=True):
        top = rng.randint(20, 360)  # and below, a corner radius of 0 for a square or 60 for a circle
        ImageDraw.Draw(image).rounded_rectangle((left, top, left + 120, top + 120), rng.choice((0, 60)), fill=colour)
    return image, rng.choice(("What shape is the {} object?", "Is there a {} circle?")).format(colours[0])


def run_layers(decoder, layers, x, positions, cache):
    causal = torch.full((1, 1, x.shape[1], x.shape[1]), -torch.inf).triu(1)
    for layer in layers:
        x = layer(x, position_embeddings=decoder.rotary_emb(x, positions), attention_mask=causal, past_key_values=cache)
    return x


def tokens_to_keep(layer, x, rotary, visual):
    causal = torch.full((1, 1, x.shape[1], x.shape[1]), -torch.inf).triu(1)
    attention = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=causal)[1][0].mean(0)
    received = attention[visual.nonzero().max() + 1 :, visual].amax(0)  # the most that a token after the image gives
    best = received.topk(max(1, round(KEEP * len(received)))).indices
    return torch.cat([(~visual).nonzero()[:, 0], visual.nonzero()[best, 0]]).sort().values


def generate(model, inputs):
    decoder = model.get_decoder()
    visual = inputs["input_ids"][0] == model.config.image_token_id
    features = model.get_image_features(**{k: v for k, v in inputs.items() if "pixel" in k or k == "image_sizes"}).pooler_output
    x = decoder.embed_tokens(inputs["input_ids"]).masked_scatter(visual[:, None], torch.cat(list(features)))
    cache = DynamicCache(config=decoder.config)
    x = run_layers(decoder, decoder.layers[:LAYER], x, torch.arange(len(visual))[None], cache)
    kept = tokens_to_keep(decoder.layers[LAYER], x, decoder.rotary_emb(x, torch.arange(len(visual))[None]), visual)
    x = run_layers(decoder, decoder.layers[LAYER:], x[:, kept], kept[None], cache)  # at the positions they had
    tokens = []
    for position in range(len(visual), len(visual) + NEW_TOKENS):  # on from the whole prompt's length
        tokens.append(model.lm_head(decoder.norm(x[:, -1])).argmax(-1))
        x = run_layers(decoder, decoder.layers, decoder.embed_tokens(tokens[-1][None]), torch.tensor([[position]]), cache)
    return torch.cat(tokens)


@torch.no_grad()
def main():
    model, processor = load()
    same = 0
    for image, question in map(draw_scene, TEST):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        full = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        same += torch.equal(full, generate(model, inputs)[: len(full)])
    print(f"{KEEP:.0%} of the visual tokens from layer {LAYER} on: same answer as with all in {same} of {len(TEST)} scenes")


if __name__ == "__main__":
    main()
