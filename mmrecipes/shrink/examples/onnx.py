import numpy as np
import onnxruntime as ort


def load(folder):
    """Two graphs: one turns images into visual tokens; one reads them and token ids after its KV cache, and gives logits."""
    files, cpu = (str(folder / f"{name}.onnx") for name in ("vision", "language")), ["CPUExecutionProvider"]
    vision, language = (ort.InferenceSession(file, providers=cpu) for file in files)
    names, length = [i.name for i in language.get_inputs()], 0
    past = [i for i in language.get_inputs() if i.name.startswith("input.")]  # the cache, without tokens; states, all zero
    cache = {i.name: np.zeros([1, *(n if isinstance(n, int) else 0 for n in i.shape[1:])], np.float32) for i in past}
    outputs = ["logits", *(name.replace("input.", "output.", 1) for name in cache)]

    def encode(run):
        tokens = vision.run(None, run)[0]
        return tokens.reshape(-1, tokens.shape[-1])

    def step(ids, features, positions):
        nonlocal length
        more = {} if positions is None else {"position_ids": positions}
        more |= {"past_length": np.array([length])} if "past_length" in names else {}
        logits, *new = language.run(outputs, {"input_ids": np.array([ids]), "image_features": features, **cache, **more})
        cache.update(zip(cache, new, strict=True))
        length += len(ids)
        return logits[0, -1]

    return encode, step
