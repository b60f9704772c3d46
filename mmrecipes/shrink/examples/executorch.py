import numpy as np  # noqa: F401 - for what follows
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - the kernels of the language program's attention
from executorch.runtime import Runtime


def load(folder):
    """Two programs: one turns images into visual tokens; one reads them and token ids after its KV cache, and gives logits.
    On a phone both run from Kotlin, Swift or C++ (link extension_llm_custom_ops beside the XNNPACK backend)."""
    programs = [Runtime.get().load_program(folder / f"{name}.pte") for name in ("vision", "language")]
    vision, language = (program.load_method("forward") for program in programs)
    cached = 0  # how many tokens of the cache, which is inside, count

    def encode(run):
        tokens = vision.execute([torch.tensor(each) for each in run.values()])[0].clone().numpy()
        return tokens.reshape(-1, tokens.shape[-1])

    def step(ids, features, positions):
        nonlocal cached
        logits = language.execute([torch.tensor([ids]), torch.from_numpy(features), torch.tensor([cached])])[0]
        cached += len(ids)
        return logits[0, -1].clone().numpy()

    encode.programs = programs  # the methods need them alive
    return encode, step
