import numpy as np
import onnxruntime as ort
import openvino as ov


def load(folder):
    """Two graphs, each in the runtime that ran it faster: OpenVINO turns images into visual tokens; ONNX Runtime reads them and
    token ids after its KV cache, and gives logits."""
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}  # what the model was checked in
    vision = ov.Core().compile_model(folder / "vision.xml", "CPU", settings).create_infer_request()
    language = ort.InferenceSession(str(folder / "language.onnx"), providers=["CPUExecutionProvider"])
    names, length = [i.name for i in language.get_inputs()], 0
    past = [i for i in language.get_inputs() if i.name.startswith("input.")]  # the cache, without tokens; states, all zero
    cache = {i.name: np.zeros([1, *(n if isinstance(n, int) else 0 for n in i.shape[1:])], np.float32) for i in past}
    outputs = ["logits", *(name.replace("input.", "output.", 1) for name in cache)]

    def encode(run):
        tokens = vision.infer([*run.values()] if len(run) == 1 else run)[0].copy()
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
