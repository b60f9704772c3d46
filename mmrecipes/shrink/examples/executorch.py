import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - the kernels of the language program's attention
from executorch.runtime import Runtime


def load(folder):
    """Two programs: one turns images into visual tokens; one reads them and token ids after its KV cache, and gives logits.
    On a phone both run from Kotlin, Swift or C++ (link extension_llm_custom_ops beside the XNNPACK backend)."""
    programs = [Runtime.get().load_program(folder / f"{name}.pte") for name in ("vision", "language")]
    vision, language = (program.load_method("forward") for program in programs)
    cached = 0  # how many tokens of the cache, which is inside, count

    def encode(tiles):
        found = [vision.execute([torch.tensor(tile)])[0].clone() for tile in tiles]
        return torch.cat([tokens.reshape(-1, tokens.shape[-1]) for tokens in found])

    def step(ids, features):
        nonlocal cached
        logits = language.execute([torch.tensor([ids]), features, torch.tensor([cached])])[0]
        cached += len(ids)
        return logits

    encode.programs = programs  # the methods need them alive
    return encode, step
