# Can a CNN replace the vision transformer of a VLM?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/31_swap_the_vision_encoder.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
import statistics
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
ENCODER = os.environ.get("ENCODER", "google/mobilenet_v2_1.0_224")  # or apple/mobilevit-small, MBZUAI/swiftformer-xs
TRAIN = range(0, 75)  # seeds of drawn scenes; put some hundred of your own images in their place
TEST = range(1000, 1025)  # other scenes
RIDGE = 1e-3  # keeps the linear map small where channels are nearly alike


def load(name, source, expected, model_class, processor_class):
    try:
        return model_class.from_pretrained(source, dtype=torch.float32), processor_class.from_pretrained(source)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"{name}={source!r}: set it to the hub id or directory of {expected} ({reason})") from None


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "white")
    for left in rng.sample(range(380), 3):
        colour = tuple(rng.choices(range(256), k=3))
        ImageDraw.Draw(image).rounded_rectangle((left, left // 2, left + 130, left // 2 + 130), rng.choice((0, 65)), fill=colour)
    return image


def timed(network, args, kwargs):
    """The last hidden state, and the milliseconds it took."""
    start = time.perf_counter()
    hidden = network(*args, **kwargs).last_hidden_state
    return hidden, 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def main():
    model, processor = load("MODEL", MODEL, "a vision-language model", AutoModelForImageTextToText, AutoProcessor)
    cnn, cnn_processor = load("ENCODER", ENCODER, "a CNN", AutoModel, AutoImageProcessor)
    vision_encoder = model.get_encoder(modality="image")
    seen = []
    hook = vision_encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    processor.image_processor.do_image_splitting = False  # both encoders see the whole image once
    for image in map(draw_scene, (*TRAIN, *TEST)):
        model(**processor(images=[image], text=[prompt], return_tensors="pt"))
    hook.remove()
    rows = []  # per image: the CNN's features (tokens, channels), the encoder's (tokens, width)
    times = []
    for seed, (args, kwargs) in zip((*TRAIN, *TEST), seen, strict=True):
        old, old_time = timed(vision_encoder, args, kwargs)
        maps, new_time = timed(cnn, (), cnn_processor(images=[draw_scene(seed)], return_tensors="pt"))
        side = int(old.shape[1] ** 0.5)
        new = torch.nn.functional.interpolate(maps, size=(side, side), mode="bilinear")[0].flatten(1).T
        rows.append((new, old[0, -side * side :]))  # without a class token
        times.append((old_time, new_time))
    x, y = (torch.cat(part).double() for part in zip(*rows[: len(TRAIN)], strict=True))
    test_x, test_y = (torch.cat(part).double() for part in zip(*rows[len(TRAIN) :], strict=True))
    ridge = RIDGE * len(x) * x.square().mean() * torch.eye(x.shape[1])  # no offset: many connectors have no bias to fold it into
    linear = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    missed = (test_x @ linear - test_y).square().mean() / test_y.var(0, unbiased=False).mean()  # each feature's own mean
    old_time, new_time = (statistics.median(part) for part in zip(*times, strict=True))
    print(f"a linear map of the CNN explains {1 - missed:.0%} of the features' variance (R²) on {len(TEST)} other scenes")
    print(f"median time an image: {old_time:.1f} ms the model's own vision encoder, {new_time:.1f} ms the CNN")


if __name__ == "__main__":
    main()
