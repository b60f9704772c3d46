import numpy as np
import openvino as ov


def load(folder):
    """Two graphs: one turns images into visual tokens; one reads them and token ids after its KV cache, and gives logits."""
    # "f32" is what the model was checked in; without it a CPU with instructions for bf16 would compute in that
    core, settings = ov.Core(), {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    graphs = [core.compile_model(folder / f"{name}.xml", "CPU", settings) for name in ("vision", "language")]
    vision, language = (graph.create_infer_request() for graph in graphs)  # the second keeps the cache

    def encode(run):
        tokens = vision.infer([*run.values()] if len(run) == 1 else run)[0].copy()
        return tokens.reshape(-1, tokens.shape[-1])

    def step(ids, features, positions):
        given = {"input_ids": np.array([ids]), "image_features": features, "beam_idx": np.zeros(1, np.int32)}
        given |= {} if positions is None else {"position_ids": positions}
        return language.infer(given)["logits"][0, -1].copy()

    return encode, step
