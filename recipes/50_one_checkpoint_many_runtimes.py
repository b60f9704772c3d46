# One checkpoint, three runtimes: who answers fastest, and who still answers right?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/50_one_checkpoint_many_runtimes.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import nncf
import openvino as ov
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
TEST = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")  # scenes; better: your own images and questions
NEW_TOKENS = 6  # per answer, unless it ends before


def draw_scene(colour):
    image = Image.new("RGB", (512, 512), "lightgrey")
    ImageDraw.Draw(image).rounded_rectangle((150, 150, 350, 350), (0, 100)[len(colour) % 2], fill=colour)
    return image, (f"What shape is the {colour} object?", "What colour is the object?")[len(colour) > 5]


class Decoder(torch.nn.ModuleList):  # of the decoder and its head: what is exported
    def forward(self, past_key_values, **new):
        out = self[0](**new, past_key_values=past_key_values, use_cache=True)
        return {"logits": self[1](out.last_hidden_state[:, -1:]), "past_key_values": out.past_key_values}


def compile_decoder(model, new, cache):
    if any(cache.is_sliding) or not all(hasattr(layer, "keys") for layer in cache.layers):
        raise SystemExit(f"MODEL={MODEL!r}: some layers look back over a window or keep states, which are not exported here")
    length = torch.export.Dim("length", min=1)
    axes = {"inputs_embeds": {1: length}, "position_ids": {new["position_ids"].ndim - 1: length}}
    axes["past_key_values"] = [{2: torch.export.Dim("past", min=0)}] * (2 * len(cache.layers))
    example = {"inputs_embeds": new["inputs_embeds"][:, :3], "position_ids": new["position_ids"][..., :3].clone()}
    module = Decoder([model.get_decoder(), model.lm_head]).eval()
    graph = OpenVINOExporter().export(module, example | {"past_key_values": cache}, OpenVINOConfig(dynamic_shapes=axes)).program
    exact = ov.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"})  # not the defaults
    small = ov.compile_model(nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM), "CPU")
    return exact.create_infer_request(), small.create_infer_request()


def generate(request, model, new):
    request.reset_state()  # an empty cache
    stop = torch.tensor(model.generation_config.eos_token_id or -1).flatten().tolist()  # one token or several
    tokens = []
    while len(tokens) < NEW_TOKENS and not set(tokens[-1:]) & set(stop):
        feed = {name: value.numpy() for name, value in new.items()} | {"beam_idx": torch.zeros(1, dtype=torch.int32).numpy()}
        tokens.append(int(request.infer(feed)["logits"].argmax()))
        positions = new["position_ids"][..., -1:] * 0 + new["position_ids"].max() + 1  # with M-RoPE, too: after the largest
        new = {"inputs_embeds": model.get_input_embeddings()(torch.tensor([tokens[-1:]])), "position_ids": positions}
    return tokens


@torch.no_grad()
def main():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None
    seen = {}  # what PyTorch gives its decoder: embeddings, visual tokens in their places, and the positions of both
    model.get_decoder().register_forward_pre_hook(lambda _, args, named: seen.update(named), with_kwargs=True)
    requests = same = 0
    for image, question in map(draw_scene, TEST):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0)
        wanted = made[0, inputs["input_ids"].shape[1] :].tolist()
        cache = model(**inputs, use_cache=True).past_key_values
        prompt = {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}  # 0, 1, 2, ... unless the model gives its own
        prompt |= {name: seen[name] for name in ("inputs_embeds", "position_ids") if seen.get(name) is not None}
        requests = requests or compile_decoder(model, prompt, cache)
        exact, small = (generate(request, model, prompt) for request in requests)
        if exact != wanted:  # masks of its own, say, or visual tokens that deeper layers take
            raise SystemExit(f"MODEL={MODEL!r}: its decoder takes more than embeddings and positions: {exact}, not {wanted}")
        same += small == wanted
    print(f"the tokens of PyTorch's generate: OpenVINO fp32 in all {len(TEST)} scenes, with 8-bit weights in {same}")


main()
