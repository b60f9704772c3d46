# One checkpoint, three runtimes: who answers fastest, and who still answers right?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/50_one_checkpoint_many_runtimes.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import nncf
import numpy as np
import openvino as ov
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
PICTURE, QUESTION = Image.new("RGB", (512, 512), "teal"), "What is in this picture?"
processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
body, config, given = getattr(model.model, "text_model", None) or model.model.language_model, model.config.get_text_config(), {}


class Decoder(torch.nn.Module):
    def forward(self, inputs_embeds, past_key_values):
        found = body(inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=True)
        return {"logits": model.lm_head(found.last_hidden_state[:, -1:]), "past_key_values": found.past_key_values}


turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
text = [processor.apply_chat_template(turns, add_generation_prompt=True)]
body.register_forward_pre_hook(lambda _, args, named: given.update(x=named["inputs_embeds"]), with_kwargs=True)
with torch.no_grad():  # once through PyTorch: the prompt's embeddings, visual tokens in their places, and a cache
    cache = model(**processor(images=[PICTURE], text=text, return_tensors="pt"), use_cache=True).past_key_values
x, decoder = given["x"], Decoder().eval()
decoder.body, decoder.head = body, model.lm_head
free = {"inputs_embeds": {1: torch.export.Dim("words", min=1)}}
free["past_key_values"] = [{2: torch.export.Dim("before", min=0)}] * (2 * config.num_hidden_layers)
example = {"inputs_embeds": x[:, :3], "past_key_values": cache}
graph = OpenVINOExporter().export(decoder, example, OpenVINOConfig(dynamic_shapes=free)).program
request = ov.compile_model(nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM), "CPU").create_infer_request()
for _ in range(8):
    word = request.infer({"inputs_embeds": x.detach().numpy(), "beam_idx": np.zeros(1, np.int32)})["logits"].argmax(-1)
    print(processor.tokenizer.decode(word[0], skip_special_tokens=True), end="")
    x = model.get_input_embeddings()(torch.from_numpy(word))
