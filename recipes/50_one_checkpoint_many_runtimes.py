# One checkpoint, three runtimes: who answers fastest, and who still answers right?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/50_one_checkpoint_many_runtimes.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import nncf
import openvino as ov
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
TEST = range(8)  # seeds of drawn scenes; put your own images and questions in their place
NEW_TOKENS = 6  # per answer


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "lightgrey")
    colours = rng.sample(("red", "orange", "yellow", "green", "blue", "purple", "black"), 3)
    for left, top, colour in zip((20, 190, 360), rng.sample(range(20, 360), 3), colours, strict=True):
        ImageDraw.Draw(image).rounded_rectangle((left, top, left + 120, top + 120), rng.choice((0, 60)), fill=colour)
    return image, rng.choice(("What shape is the {} object?", "Is there a {} circle?")).format(colours[0])


class Decoder(torch.nn.ModuleList):  # of the decoder and its head: what is exported
    def forward(self, inputs_embeds, past_key_values):
        out = self[0](inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=True)
        return {"logits": self[1](out.last_hidden_state[:, -1:]), "past_key_values": out.past_key_values}


def compile_decoder(model, embeds, cache):
    if any(cache.is_sliding):
        raise SystemExit(f"MODEL={MODEL!r}: some of its layers look back over a window, whose KV cache is not exported here")
    shapes = {"inputs_embeds": {1: torch.export.Dim("new", min=1)}}
    shapes["past_key_values"] = [{2: torch.export.Dim("past", min=0)}] * (2 * model.config.get_text_config().num_hidden_layers)
    example = {"inputs_embeds": embeds[:, :3], "past_key_values": cache}
    decoder = Decoder([model.get_decoder(), model.lm_head]).eval()
    graph = OpenVINOExporter().export(decoder, example, OpenVINOConfig(dynamic_shapes=shapes)).program
    return ov.compile_model(nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM), "CPU").create_infer_request()


def generate(request, model, embeds):
    request.reset_state()  # an empty cache
    tokens = []
    for _ in range(NEW_TOKENS):
        logits = request.infer({"inputs_embeds": embeds.numpy(), "beam_idx": torch.zeros(1, dtype=torch.int32).numpy()})["logits"]
        tokens.append(int(logits.argmax()))
        embeds = model.get_input_embeddings()(torch.tensor([tokens[-1:]]))
    return tokens


@torch.no_grad()
def main():
    model, processor = load()
    prompt = {}  # the embeddings that PyTorch gives its language model, visual tokens in their places
    model.get_decoder().register_forward_pre_hook(lambda _, args, named: prompt.update(named), with_kwargs=True)
    request = None
    same = 0
    for image, question in map(draw_scene, TEST):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        wanted = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        cache = model(**inputs, use_cache=True).past_key_values
        embeds = prompt["inputs_embeds"]
        request = request or compile_decoder(model, embeds, cache)
        same += generate(request, model, embeds)[: len(wanted)] == wanted  # up to where PyTorch's answer ends
    print(f"OpenVINO with 8-bit weights gives PyTorch's fp32 answer in {same} of {len(TEST)} scenes")


if __name__ == "__main__":
    main()
