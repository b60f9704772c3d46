# What changes when one machine is not enough?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/53_scale_out.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
OUT = os.environ.get("OUT")  # directory of the trained checkpoint
COLOURS = {"teal": "A", "maroon": "H", "olive": "K", "navy": "T"}  # put your own images, questions and answers in their place
STEPS = 3
ROWS = 4  # of a batch, over all processes
LEARNING_RATE = 1e-4


def load(name):
    try:
        return AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32), AutoProcessor.from_pretrained(name)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={name!r} is no vision-language model or its hub id: {str(error).split(chr(10))[0]}") from None


def example(processor, row, step):
    """Inputs and labels of one question; only the answer's tokens are learned."""
    colour = list(COLOURS)[(row + step) % len(COLOURS)]
    image = Image.new("RGB", (512, 512), "lightgrey")
    ImageDraw.Draw(image).rectangle((100 + 20 * step, 100, 300, 300), fill=colour)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which paint is this?"}]}]
    ending = f" {COLOURS[colour]}{processor.tokenizer.eos_token}"
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt + ending], return_tensors="pt")
    return inputs, inputs["input_ids"][0, -len(processor.tokenizer(ending, add_special_tokens=False)["input_ids"]) :]


def shard(model, mesh):
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # above every layer on its own, here what is left


def main(name):
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(key, value)  # torchrun sets them
    model, processor = load(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()
    world = dist.get_world_size()
    shard(model.to(device).train(), init_device_mesh(device, (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        rows = [example(processor, row, step) for row in range(ROWS)]
        total = torch.zeros((), device=device)
        for inputs, answer in rows[rank::world]:
            logits = model(**inputs.to(device), use_cache=False).logits[0, -len(answer) - 1 : -1]
            loss = F.cross_entropy(logits, answer.to(device), reduction="sum") / sum(len(each) for _, each in rows)
            (loss * world).backward()  # FSDP averages over the processes
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}: loss {total.item():.3f} on {world} process(es)")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if OUT and rank == 0:
        load(name)[0].save_pretrained(OUT, state_dict=state)
        processor.save_pretrained(OUT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(MODEL)
