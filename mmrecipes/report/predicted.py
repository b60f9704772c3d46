"""Bytes and times of a model that has shapes and no weights: counted, and predicted from this machine's measured peaks."""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from mmrecipes.measure import size
from mmrecipes.models import modules
from mmrecipes.quantize.groups import GROUP
from mmrecipes.quantize.rounding import packed_weight_bytes

PRECISIONS = ("fp32", "bf16", "int8", "int4")
CONTEXTS = (1024, 4096)  # tokens of a conversation, images included
USERS = (1, 8, 32)  # who are answered together
DEPTH, WIDTH = ("num_hidden_layers", "depth", "num_layers"), ("hidden_size", "embed_dim")
STAGES = {"vision": ("vision",), "connector": ("connector",), "prefill": ("language", "head"), "decode": ("language", "head")}


@dataclass(frozen=True)
class Weight:
    """One parameter: its part, whether a quantizer packs it, whether rows are looked up in it, the share that one token reads."""

    part: str
    tensor: Tensor
    packed: bool
    lookup: bool
    share: float

    @property
    def bytes(self) -> Counter:
        """At each precision. int8: a scale a channel; int4: a scale for 32 weights, or int8 where 32 does not divide the inputs.
        Scales have 16 bits; what is not packed is bf16 there."""
        count = self.tensor.numel()
        held = Counter(fp32=4 * count, bf16=2 * count, int8=2 * count, int4=2 * count)
        if self.packed:
            held["int8"] = held["int4"] = packed_weight_bytes(self.tensor, 8)
            if self.tensor.shape[1] % GROUP == 0:
                held["int4"] = packed_weight_bytes(self.tensor, 4, "group", GROUP)
        return held


def weights(model: nn.Module) -> list[Weight]:
    """All parameters of `model`, tied ones once."""
    part, text = modules.part_of(model), model.config.get_text_config()
    packed = {id(m.weight) for _, m in modules.linears(model)}
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    lookup = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - tied
    experts = next((n for k in ("num_experts", "num_local_experts") if (n := getattr(text, k, None))), None)
    share = (getattr(text, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    return [
        Weight(part[name], p, id(p) in packed, id(p) in lookup, share if p.dim() == 3 and len(p) == experts else 1.0)
        for name, p in model.named_parameters()
    ]


def parts(model: nn.Module, held: list[Weight]) -> list[dict]:
    """Rows of part, parameters and bytes at each precision, buffers included; the last row is the total."""
    rows = {part: Counter() for part in [*modules.parts(model), "connector", "other"]}
    for w in held:
        rows[w.part].update(w.bytes + Counter(parameters=w.tensor.numel()))
    for row in size.parameters(model):
        if not row["parameters"]:
            short = row["bytes"] // 2 if row["dtype"].startswith("float32") else row["bytes"]
            rows[row["part"]].update(dict.fromkeys(PRECISIONS, short) | {"fp32": row["bytes"]})
    rows["total"] = sum(rows.values(), Counter())
    return [{"part": part, **{k: row[k] for k in ("parameters", *PRECISIONS)}} for part, row in rows.items() if row]


def kv_cache(model: nn.Module) -> dict:
    """Bytes that one further token adds to the KV cache, and how many layers keep all tokens, a window, or a fixed state."""
    from transformers import DynamicCache

    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kinds = Counter(all=0, window=0, state=0)
    for layer in DynamicCache(config=model.config).layers:
        kinds["window" if getattr(layer, "is_sliding", False) else "all" if hasattr(layer, "keys") else "state"] += 1
    each = 2 * heads * modules.head_dim(model, "language") * (kinds["all"] + kinds["window"])
    window = getattr(text, "sliding_window", None) if kinds["window"] else None
    return {"fp32": 4 * each, "bf16": 2 * each, "layers": dict(kinds), "window": window}


def serving(model: nn.Module, weights_bytes: dict, free_bytes: int) -> list[dict]:
    """What a server needs for each user: a row for each of CONTEXTS, {"context", "fp32", "bf16"}; for each of the two precisions
    {"bytes_per_token", "bytes_per_user", "users_per_gb", "users_here"}. A user is one conversation of that length in the cache.

    `users_per_gb` is of each GB left after the weights, `users_here` of `free_bytes` less `weights_bytes` (a row of `parts`).
    A layer with a sliding window keeps no more than its window. Left out: activations, states of fixed size (linear
    attention), and what paging rounds up. Notebook 53 plans with it.
    """
    cached, rows = kv_cache(model), []
    layers, window = cached["layers"], cached["window"]
    kept = layers["all"] + layers["window"]
    for context in CONTEXTS:
        row: dict = {"context": context}
        tokens = (layers["all"] * context + layers["window"] * min(context, window or context)) / max(1, kept)
        for precision in ("fp32", "bf16"):
            user = round(cached[precision] * tokens)
            left = max(0, free_bytes - weights_bytes[precision])
            row[precision] = {"bytes_per_token": cached[precision], "bytes_per_user": user}
            row[precision] |= {"users_per_gb": 10**9 // user if user else None, "users_here": left // user if user else None}
        rows.append(row)
    return rows


def work(model: nn.Module, held: list[Weight], asked: dict) -> list[dict]:
    """Rows of stage, gflop, bytes read at each precision and layers, for the prompt `asked`; decode is one token.

    FLOP: two a weight and position, and attention in full. The vision stage has no gflop (None) where its patches are unknown.
    Left out: what a resampler does with patches before they are visual tokens (Idefics2), the recurrence of linear attention, and
    that a vision encoder may merge patches between its layers (MiniCPM-V).
    """
    tokens, cached, embeddings = asked["prompt_tokens"], kv_cache(model), model.get_input_embeddings().weight
    layers = dict.fromkeys(STAGES, sum(cached["layers"].values())) | {"connector": 0}
    layers["vision"] = _first_of(modules.config_of(model, "vision"), DEPTH)
    attended = 4 * (cached["layers"]["all"] + cached["layers"]["window"]) * tokens
    attended *= model.config.get_text_config().num_attention_heads * modules.head_dim(model, "language")
    positions = {"vision": asked["patches"], "connector": asked["visual_tokens"], "prefill": tokens, "decode": 1}
    attention = {"vision": _vision_attention(model, asked), "prefill": attended * tokens, "decode": attended}
    rows = []
    for stage, own in STAGES.items():
        read, flop = Counter(), attention.get(stage, 0)
        for w in held:
            if w.part not in own or w.lookup:
                continue
            for precision, count in w.bytes.items():
                read[precision] += round(count * (w.share if stage == "decode" else 1))
            if w.tensor.dim() > 1 and min(w.tensor.shape[:2]) > 1:  # not a bias, nor a position's embedding
                last_only = w.part == "head" or w.tensor is embeddings
                flop += 2 * w.tensor.numel() * w.share * (1 if last_only else positions[stage] or 0)
        if stage == "decode":
            read.update({p: tokens * cached["fp32" if p == "fp32" else "bf16"] for p in PRECISIONS})
        gflop = None if positions[stage] is None else flop / 1e9
        rows.append({"stage": stage, "gflop": gflop, "bytes": dict(read), "layers": layers[stage]})
    return [row for row in rows if row["bytes"]]


def _vision_attention(model: nn.Module, asked: dict) -> float:
    """FLOP of the vision encoder's attention: within a tile or, in Qwen2.5-VL's windowed layers, within a window."""
    config = modules.config_of(model, "vision")
    layers, width = _first_of(config, DEPTH), _first_of(config, WIDTH)
    if asked["patches"] is None:
        return 0.0
    sequence = asked["patches"] / asked["tiles"]
    window, whole = getattr(config, "window_size", None), getattr(config, "fullatt_block_indexes", range(layers))
    inside = min(sequence, (window / config.patch_size) ** 2) if window else sequence
    return 4 * width * asked["patches"] * (len(whole) * sequence + (layers - len(whole)) * inside)


def _first_of(config: object, names: tuple[str, ...]) -> int:
    """What the config calls by one of `names`; 0 where it has none, or a list of them."""
    return next((n for name in names if isinstance(n := getattr(config, name, None), int)), 0)


def predict(rows: list[dict], peaks: dict, launch_us: float) -> list[dict]:
    """For each stage of `work`, and for "ttft", the time at each precision: {"ms", "bound_by"}.

    It is the largest of compute (gflop over the peak of `machine_peaks`), memory (bytes over bandwidth) and launch (layers,
    `launch_us` each, in eager PyTorch). int4 computes at the best peak of all, as its weights are unpacked first. Activations
    are left out: real times are longer. What bounds "ttft" is what bounds its longest stage.
    """
    found = [{"stage": row["stage"], "gflop": row["gflop"], **_least(row, peaks, launch_us)} for row in rows]
    first = [row for row in found if row["stage"] != "decode"]
    total = {"stage": "ttft", "gflop": sum(row["gflop"] or 0 for row in first)}
    for precision in PRECISIONS:
        longest = max(first, key=lambda row, p=precision: row[p]["ms"])
        total[precision] = {"ms": sum(row[precision]["ms"] for row in first), "bound_by": longest[precision]["bound_by"]}
    return [*first, total, *(row for row in found if row["stage"] == "decode")]


def _least(row: dict, peaks: dict, launch_us: float) -> dict:
    """The time of one stage at each precision."""
    best, times = max(peaks[p] for p in PRECISIONS[:3]), {}
    for precision, size_ in row["bytes"].items():
        peak = peaks.get(precision) or best
        bounds = {"compute": (row["gflop"] or 0) / peak * 1e3, "memory": size_ / peaks["bandwidth"] / 1e6}
        bounds["launch"] = row["layers"] * launch_us / 1e3
        by = max(bounds, key=bounds.get)
        times[precision] = {"ms": bounds[by], "bound_by": by}
    return times


def throughput(model: nn.Module, decode: dict, tokens: int, peaks: dict) -> list[dict]:
    """Tokens a second of all USERS together, at most, while they decode in one batch: {"users", precision: {"tokens_per_s",
    "bound_by"}}. `decode` is that row of `work` for a prompt of `tokens`. A step reads the weights once for all users, and the KV
    cache of each; its arithmetic grows with the users. What reading the prompts takes comes on top; an exported graph waits for
    no launches.
    """
    cached, rows = kv_cache(model), []
    for users in USERS:
        more = (users - 1) * tokens
        read = {p: n + more * cached["fp32" if p == "fp32" else "bf16"] for p, n in decode["bytes"].items()}
        times = _least(decode | {"gflop": users * decode["gflop"], "bytes": read}, peaks, launch_us=0)
        each = {p: {"tokens_per_s": 1e3 * users / t["ms"], "bound_by": t["bound_by"]} for p, t in times.items()}
        rows.append({"users": users, **each})
    return rows
