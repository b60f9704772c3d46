import numpy as np
import openvino as ov


def load(folder):
    """Two graphs: one turns images into visual tokens; one reads them and token ids after its KV cache, and gives logits."""
    # "f32" is what the model was checked in; without it a CPU with instructions for bf16 would compute in that
    core, settings = ov.Core(), {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    graphs = [core.compile_model(folder / f"{name}.xml", "CPU", settings) for name in ("vision", "language")]
    vision, language = (graph.create_infer_request() for graph in graphs)  # the second keeps the cache

    def encode(tiles):
        found = [vision.infer([tile])[0].copy() for tile in tiles]
        return np.concatenate([tokens.reshape(-1, tokens.shape[-1]) for tokens in found])

    def step(ids, features):
        given = {"input_ids": np.array([ids]), "image_features": features, "beam_idx": np.zeros(1, np.int32)}
        return language.infer(given)["logits"]

    return encode, step
