import numpy as np
import onnxruntime as ort


def load(folder):
    """Two graphs: one turns images into visual tokens; one reads them and token ids after its KV cache, and gives logits."""
    files, cpu = [folder / f"{name}.onnx" for name in ("vision", "language")], ["CPUExecutionProvider"]
    vision, language = (ort.InferenceSession(file, providers=cpu) for file in files)
    # the cache starts empty: its third axis counts tokens
    cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in language.get_inputs()[2:]}
    outputs = ["logits", *(name.replace("input.", "output.", 1) for name in cache)]

    def encode(tiles):
        found = [vision.run(None, {vision.get_inputs()[0].name: tile})[0] for tile in tiles]
        return np.concatenate([tokens.reshape(-1, tokens.shape[-1]) for tokens in found])

    def step(ids, features):
        logits, *new = language.run(outputs, {"input_ids": np.array([ids]), "image_features": features, **cache})
        cache.update(zip(cache, new, strict=True))
        return logits

    return encode, step
