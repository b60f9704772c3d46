"""The PyTorch variants of the bench: how each is loaded, and its prefill and decode steps."""

from __future__ import annotations

from bench_row import CHECKPOINT, QUESTION, THREADS, WORK


def load(how: str):
    """The twin as `how` says; its processor is an attribute."""
    import torch

    from mmrecipes import models, quantize

    torch.set_num_threads(THREADS)
    if how == "nf4":
        return _nf4()
    model = models.load(CHECKPOINT, dtype="bfloat16" if how.startswith("bf16") else "float32")
    if how == "quantize_dynamic":
        model = quantize.dynamic_int8(model)
    elif how == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    elif how.endswith("compiled"):
        model.forward = torch.compile(model.forward, dynamic=True)
    return model


def calls(model):
    """The functions that `measure.time_generation` takes, of a prompt that is prepared here."""
    import torch

    from mmrecipes import models

    inputs, kept = models.chat(model, WORK / "picture.png", QUESTION), {}

    @torch.inference_mode()
    def look():
        kept["cache"] = None
        return _next(inputs)

    @torch.inference_mode()
    def step(token: int):
        return _next({"input_ids": torch.tensor([[token]])})

    def _next(given):
        found = model(**given, past_key_values=kept["cache"], use_cache=True, logits_to_keep=1)
        kept["cache"] = found.past_key_values
        return found.logits[0, -1].float().numpy()

    return look, step


def _nf4():
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, quantization_config=config, dtype=torch.float32)
    model.processor = AutoProcessor.from_pretrained(CHECKPOINT)
    return model.eval()


def reference() -> dict:
    """The prompt, as text, as token ids and positions (3, T; None where they count on), and with the visual tokens (N, D): a peer
    has another tokenizer and vision encoder."""
    import gc

    import numpy as np
    import torch

    from mmrecipes import models
    from mmrecipes.export import wrappers

    gc.collect()  # the model that was measured: two of 3B parameters in fp32 are too many
    model = models.load(CHECKPOINT)
    inputs, family = models.chat(model, WORK / "picture.png", QUESTION), wrappers.family_of(model)
    with torch.inference_mode():
        found = model.model.get_image_features(**{k: v for k, v in inputs.items() if k.startswith(("pixel_", "image_grid"))})
    visual = torch.cat([each.reshape(-1, each.shape[-1]) for each in found.pooler_output])
    given = {k: np.asarray(v) for k, v in inputs.items()}
    places = family.positions(given, family.settings(model))[:, 0].tolist() if family.positions else None
    prompt = {"prompt": models.chat_prompts(model.processor, [QUESTION])[0], "prompt_ids": inputs["input_ids"][0].tolist()}
    return prompt | {"positions": places, "image_token_id": model.config.image_token_id, "visual_tokens": visual.tolist()}
