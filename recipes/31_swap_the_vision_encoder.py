# Must a model that reads pictures have a transformer for an eye?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/31_swap_the_vision_encoder.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
ENCODER = os.environ.get("ENCODER", "google/mobilenet_v2_1.0_224")  # or apple/mobilevit-small, MBZUAI/swiftformer-xs
processor, model = AutoProcessor.from_pretrained(MODEL), AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
scale, cnn = AutoImageProcessor.from_pretrained(ENCODER), AutoModel.from_pretrained(ENCODER, dtype=torch.float32).eval()
vit = next(m for n, m in model.eval().named_modules() if n.split(".")[-1] in ("vision_model", "vision_tower", "visual"))
prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True)
processor.image_processor.do_image_splitting = False  # both see the whole picture once
seen, ms = {}, {"its encoder": [], ENCODER.split("/")[-1]: []}
vit.register_forward_hook(lambda _, args, kw, out: seen.update(args=args, kw=kw, out=out.last_hidden_state[0]), with_kwargs=True)


def draw(seed):  # put your own pictures here, some hundred of them
    rng, picture = random.Random(seed), Image.new("RGB", (512, 512), "white")
    for box in ((x, x // 2, x + 130, x // 2 + 130) for x in rng.sample(range(380), 3)):
        getattr(ImageDraw.Draw(picture), rng.choice(("ellipse", "rectangle")))(box, fill=tuple(rng.choices(range(256), k=3)))
    return picture


pairs = []
for picture in map(draw, range(100)):
    with torch.inference_mode():
        model(**processor(images=[picture], text=[prompt], return_tensors="pt"))
        old, side, pixels = seen["out"], int(len(seen["out"]) ** 0.5), scale(images=[picture], return_tensors="pt")
        for taken, (net, args, kw) in zip(ms.values(), ((vit, seen["args"], seen["kw"]), (cnn, (), pixels)), strict=True):
            begin, maps = time.perf_counter(), net(*args, **kw).last_hidden_state
            taken.append(1000 * (time.perf_counter() - begin))
    new = torch.nn.functional.interpolate(maps, size=(side, side), mode="bilinear")[0].flatten(1).T
    pairs.append((torch.cat([new, torch.ones(len(new), 1)], 1), old[-side * side :]))  # an offset; no class token
(x, y), (new, old) = ([torch.cat(t).double() for t in zip(*part, strict=True)] for part in (pairs[:75], pairs[75:]))
linear = torch.linalg.solve(x.T @ x + 1e-3 * len(x) * x.square().mean() * torch.eye(x.shape[1]), x.T @ y)
missed = (new @ linear - old).square().mean() / old.var(0, unbiased=False).mean()
print(f"explained: {1 - missed:.0%} | ms a picture:", {k: round(sorted(v)[len(v) // 2], 1) for k, v in ms.items()})
