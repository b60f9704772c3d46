# How narrow can a model be made without training?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/23_slicegpt_and_width.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
from copy import deepcopy

import torch
from PIL import Image, ImageDraw
from torch.nn import Linear, Parameter, Sequential
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
SHARES = (1, 0.875, 0.75, 0.5)  # of the hidden size; the first is a rotation alone, and must change nothing
SCENES = 24  # images that find the directions, with a question each; as many others judge


def prepare(processor, seed):
    """The model's inputs for a drawn image and a question: put your own in their place."""
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "gainsboro")
    ImageDraw.Draw(image).rounded_rectangle((60, 60, 250, 250), rng.choice((0, 95)), fill=rng.choice(("red", "blue", "green")))
    question = rng.choice(("What colour is the object?", "Is there a red object?", "Which shape does the object have?"))
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[image], text=[prompt], return_tensors="pt")


def next_token_log_probs(model, batches):
    return torch.stack([model(**inputs).logits[0, -1] for inputs in batches]).log_softmax(-1)


def directions(model, batches):
    """Principal components (D, D) of the residual stream after each layer, strongest first."""
    total = 0
    for inputs in batches:
        *states, last = model(**inputs, output_hidden_states=True).hidden_states
        for state in (*states, last / model.get_decoder().norm.weight):  # the last one went through the norm
            x = torch.nn.functional.normalize(state[0].double(), dim=-1)
            total = total + x.T @ x
    return torch.linalg.eigh(total).eigenvectors.flip(1).float()


def slice_decoder(model, kept):
    """A copy whose decoder works on k channels; `kept` (D, k) has orthonormal columns."""
    small = deepcopy(model)
    decoder = small.get_decoder()
    decoder.layers[0].register_forward_pre_hook(lambda _, args: (args[0] @ kept, *args[1:]))  # or fold it into what comes before
    blocks = [(decoder.norm, Sequential(small.get_output_embeddings()))]
    for layer in decoder.layers:
        blocks += [(layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)]
    for norm, block in blocks:
        for name, linear in block.named_children():
            if name in ("o_proj", "down_proj"):  # they write
                linear.weight = Parameter(kept.T @ linear.weight, False)
            elif isinstance(linear, Linear):  # they read; the norm now averages over fewer channels
                linear.weight = Parameter((linear.weight * norm.weight) @ kept * (len(kept) / kept.shape[1]) ** 0.5, False)
        norm.weight = Parameter(torch.ones(kept.shape[1]), False)
    return small


def main(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32).eval().requires_grad_(False)
        batches = [prepare(processor, seed) for seed in range(2 * SCENES)]
        rotation = directions(model, batches[:SCENES])
    except (AttributeError, ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={model_id!r}: no VLM with a Llama-like decoder loads ({' '.join(str(error).split())})") from None
    reference = next_token_log_probs(model, batches[SCENES:])
    for share in SHARES:
        width = int(share * len(rotation)) // 8 * 8
        found = next_token_log_probs(slice_decoder(model, rotation[:, :width]), batches[SCENES:])
        kl = (reference.exp() * (reference - found)).sum(-1)
        if share == 1 and kl.mean() > 1e-3:
            raise SystemExit(f"MODEL={model_id!r}: a rotation changes its answers; its decoder is not Llama's")
        same = (found.argmax(-1) == reference.argmax(-1)).sum()
        margin = 1.96 * kl.std() / SCENES**0.5  # of a 95% interval
        print(f"{width} of {len(rotation)} channels: same first token {same} of {SCENES}, KL {kl.mean():.3f} ± {margin:.3f} nats")


if __name__ == "__main__":
    main(MODEL)
