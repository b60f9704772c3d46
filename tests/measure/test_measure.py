"""Measurement: what is counted is really there, what is timed is really that stage. No tight timings: machines are busy."""

import copy
import gc
import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tiny
from mmrecipes import measure, models, quantize
from mmrecipes.errors import UserError
from mmrecipes.measure import machine, timing

PEAKS = {"fp32": 100.0, "bf16": 200.0, "int8": 400.0, "bandwidth": 10.0}


@pytest.fixture(scope="module")
def house():
    return tiny.house()


@pytest.fixture(scope="module")
def llava():
    return tiny.llava()


class Clock:
    """Time that only the test makes pass, and one millisecond a reading: stages are told apart even on a busy machine."""

    def __init__(self):
        self.ms = 0.0

    def pass_(self, ms):
        self.ms += ms

    def __call__(self):
        self.ms += 1
        return self.ms


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timing, "clock", Clock())
    return measure.clock


def chat(model):
    return models.chat(model, Image.new("RGB", (128, 128), "red"), "how many circles are there?")


def heads(model, inputs):
    """Logits (batch, words) of each of the five steps that are timed."""
    seen = []
    hook = models.parts(model)["head"].register_forward_hook(lambda _, args, out: seen.append(out[:, -1]))
    measure.latency({"": model}, inputs, new_tokens=4, repeats=1, warmup=0)
    hook.remove()
    return seen


def qwen(model):
    """Inputs of one picture of 4 x 4 patches for the tiny Qwen2.5-VL, whose connector lies inside its vision tower."""
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    image = [model.config.vision_start_token_id % 100] + [model.config.image_token_id] * 4
    ids = torch.tensor([[5, *image, 7, 8]])
    kinds = (ids == model.config.image_token_id).int()
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def nf4(model):
    """A copy with every linear layer in bitsandbytes' 4 bits."""
    import bitsandbytes as bnb

    small = models.clone(model)
    for name, layer in list(models.linears(small)):
        four = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4")
        four.load_state_dict(layer.state_dict())
        small.set_submodule(name, four.to("cpu"))
    return small


def unique(model):
    return sum(p.numel() for p in model.parameters())  # torch lists a tied weight once


# ---- the machine


def test_environment_says_what_matters_and_not_where():
    found = measure.environment()
    text = json.dumps(found)
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert 1 <= found["physical_cores"] <= found["logical_cores"]
    assert 0.2 < found["memory_gb"] < 1e5
    flagged = {"AVX2": "avx2", "AVX512": "avx512f"}.get(found["torch_capability"])
    assert flagged is None or flagged in found["capabilities"]


def test_commit_is_of_the_repository_that_tracks_the_package(tmp_path, monkeypatch):
    file = shutil.copy(machine.__file__, tmp_path)
    monkeypatch.setattr(machine, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*words):
        me = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *me, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert measure.environment()["commit"] is None
    git("init")
    git("commit", "--allow-empty", "-m", "somebody else's")
    assert measure.environment()["commit"] is None
    git("add", ".")
    git("commit", "-m", "ours")
    assert measure.environment()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "measure.py").write_text("changed")
    assert measure.environment()["commit"] == git("rev-parse", "HEAD") + "+dirty"


def test_machine_peaks_are_of_every_format_and_name_the_kernel():
    peaks = measure.machine_peaks()
    assert all(0 < peaks[k] < float("inf") for k in ("fp32", "bf16", "int8", "bandwidth"))
    assert peaks["int8_kernel"] in ("torch._int_mm", "onednn.qlinear")


# ---- bytes


@pytest.mark.parametrize("make", [tiny.house, tiny.llava, tiny.idefics2, tiny.qwen2_5_vl, tiny.qwen3_vl, tiny.siglip, tiny.clip])
def test_parameters_add_up_by_part(make):
    model = make()
    rows = measure.parameters(model)
    assert sum(r["parameters"] for r in rows) == unique(model)
    assert measure.model_bytes(model) == sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for part in {r["part"] for r in rows}:
        wanted = sum(n for name, n in sizes.items() if models.part_of(model)[name] == part)
        assert sum(r["parameters"] for r in rows if r["part"] == part) == wanted, part


def test_parameters_counts_halves_after_a_cast(house):
    rows = measure.parameters(quantize.bf16(house))
    weights = [r for r in rows if r["parameters"]]
    assert {r["dtype"] for r in weights} == {"bfloat16"}
    assert sum(r["bytes"] for r in weights) == 2 * unique(house)


def test_parameters_sees_two_names_of_one_memory_once(house):
    model = copy.deepcopy(house)
    model.alias = nn.Parameter(model.lm_head.weight.data)  # another object, the same bytes
    assert sum(r["parameters"] for r in measure.parameters(model)) == unique(house)


@pytest.mark.parametrize(("shrink", "dtype", "least", "most"), [(quantize.dynamic_int8, "int8", 8, 9.5), (nf4, "nf4", 4, 5)])
def test_parameters_sees_into_quantized_layers(house, shrink, dtype, least, most):
    small = shrink(house)
    weights = sum(layer.weight.numel() for _, layer in models.linears(house))
    rows = measure.parameters(small)
    packed = [r for r in rows if r["dtype"] == dtype]
    assert {r["part"] for r in packed} == {"vision", "connector", "language"}
    assert sum(r["parameters"] for r in packed) == weights
    assert least < 8 * sum(r["bytes"] for r in packed) / weights < most  # scales and zero points on top
    assert sum(r["parameters"] for r in rows) == unique(house)


def test_parameters_sees_into_tensor_subclasses(house):
    """torchao's tensors show what they hold through __tensor_flatten__, as this one of torch's does."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = copy.deepcopy(house)
    layer = model.model.connector.modality_projection.proj
    inner = [layer.weight.detach().half(), layer.weight.detach().half()]
    layer.weight = nn.Parameter(TwoTensor(*inner), requires_grad=False)
    row = next(r for r in measure.parameters(model) if r["part"] == "connector")
    assert row == {"part": "connector", "dtype": "float16", "parameters": inner[0].numel(), "bytes": 4 * inner[0].numel()}


def test_disk_bytes_is_the_size_of_the_real_file(house, tmp_path):
    tiny.save(house, tmp_path)
    (tmp_path / ".cache").mkdir()
    shutil.copy(tmp_path / "model.safetensors", tmp_path / ".cache")  # downloads in progress are nobody's weights
    real = (tmp_path / "model.safetensors").stat().st_size
    assert measure.disk_bytes(tmp_path) == real
    assert abs(measure.disk_bytes(house) - real) < 0.01 * real
    assert measure.disk_bytes(str(tmp_path)) == real


def test_disk_bytes_of_quantized_models(house):
    whole = measure.disk_bytes(house)
    for small in (quantize.dynamic_int8(house), nf4(house), quantize.bf16(house)):
        share = measure.disk_bytes(small) / whole
        assert abs(share - measure.model_bytes(small) / measure.model_bytes(house)) < 0.12  # names and zip headers


def test_disk_bytes_of_nothing(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no weight files"):
        measure.disk_bytes(tmp_path)


# ---- memory of a fresh process


def test_peak_memory_grows_by_what_the_model_holds(house):
    inputs = chat(house)
    plain = measure.peak_memory(house, inputs, new_tokens=2)
    heavy = copy.deepcopy(house)
    heavy.register_buffer("ballast", torch.ones(50_000_000))
    more = measure.peak_memory(heavy, inputs, new_tokens=2)
    assert 180 < more["peak_mb"] - plain["peak_mb"] < 220
    assert more["model_mb"] == pytest.approx(more["peak_mb"] - more["imports_mb"], abs=0.2)
    assert abs(more["imports_mb"] - plain["imports_mb"]) < 20
    assert plain["gpu_mb"] is None


def test_peak_memory_of_a_quantized_model_that_was_used_before(llava):
    small = quantize.dynamic_int8(llava)
    inputs = chat(llava)
    small(**inputs)  # now transformers' hooks are in it
    found = measure.peak_memory(small, inputs, new_tokens=2)
    assert 50 < found["imports_mb"] < found["peak_mb"]
    assert small.processor is llava.processor
    small(**inputs)  # and still are


def test_peak_memory_says_why_the_process_died(house):
    with pytest.raises(UserError, match=r"ended with 1: IndexError: .*out of range") as caught:
        measure.peak_memory(house, {"input_ids": torch.tensor([[10**6]])})
    assert "\n" not in str(caught.value)


def test_peak_memory_of_what_cannot_be_written(house):
    model = copy.deepcopy(house)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="cannot write this model"):
        measure.peak_memory(model, chat(house))


# ---- time


def test_wall_interleaves_in_rotating_order_without_garbage_collection():
    log, collecting = [], []

    def note(name):
        log.append(name)
        collecting.append(gc.isenabled())

    found = measure.wall({n: lambda n=n: note(n) for n in "abc"}, repeats=3, warmup=1)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert not any(collecting)
    assert gc.isenabled()
    assert list(found) == ["a", "b", "c"]


def test_wall_collects_garbage_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        measure.wall({"a": lambda: 1 / 0})
    assert gc.isenabled()


def test_wall_orders_cheap_and_dear(clock):
    found = measure.wall({"dear": lambda: clock.pass_(30), "cheap": lambda: None}, repeats=3)
    assert found["dear"]["median"] >= 30 > found["cheap"]["median"]
    assert all(t["low"] <= t["median"] <= t["high"] for t in found.values())


def test_wall_gives_quartiles_of_the_measured_rounds(clock):
    pauses = iter([900, 10, 30, 20, 50, 40])  # the warm-up, which does not count, and five rounds
    found = measure.wall({"a": lambda: clock.pass_(next(pauses))}, repeats=5, warmup=1)["a"]
    assert {k: round(v) for k, v in found.items()} == {"median": 31, "low": 21, "high": 41}  # each reading is one tick more


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_timing_refuses_no_rounds(repeats, warmup):
    with pytest.raises(UserError, match="repeat"):
        measure.wall({"a": int}, repeats=repeats, warmup=warmup)


def test_latency_refuses_what_it_cannot_time(house):
    for given, tokens in (({}, 1), ({"a": house}, 0)):
        with pytest.raises(UserError, match="one model and one token"):
            measure.latency(given, {}, new_tokens=tokens)
    with pytest.raises(UserError, match="SiglipModel does not generate"):
        measure.latency({"a": tiny.siglip()}, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_latency_of_a_padded_batch_is_that_of_its_rows(house):
    """Left padding is masked in every step: each row's logits are those that it has alone."""
    ids, more = torch.tensor([[5, 9, 70]]), torch.tensor([[90, 80, 75, 66, 60]])
    pad = torch.zeros(1, 2, dtype=torch.long)
    both = {"input_ids": torch.cat([torch.cat([pad, ids], 1), more])}
    both["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    together, *alone = (torch.stack(heads(house, inputs)) for inputs in (both, {"input_ids": ids}, {"input_ids": more}))
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-5)
    found = measure.latency({"": house}, both, new_tokens=2, repeats=1)[""]
    assert found["tokens_per_s"]["median"] == pytest.approx(2000 / found["decode"]["median"])


@pytest.mark.parametrize("make", [tiny.house, tiny.llava])
def test_latency_stages_add_up_to_ttft(make):
    model = make()
    found = measure.latency({"fp32": model}, chat(model), new_tokens=2, repeats=1, warmup=1)["fp32"]
    assert set(found) == {"vision", "connector", "prefill", "decode", "ttft", "tokens_per_s"}
    value = {k: v["median"] for k, v in found.items()}
    assert all(v > 0 for v in value.values())
    assert value["vision"] + value["connector"] + value["prefill"] == pytest.approx(value["ttft"])
    assert value["tokens_per_s"] == pytest.approx(1000 / value["decode"])


@pytest.mark.parametrize("part", ["vision", "connector", "language"])
@pytest.mark.parametrize("make", [tiny.house, tiny.llava, tiny.qwen2_5_vl])
def test_latency_finds_the_slow_part(make, part, clock):
    model = make()
    inputs = qwen(model) if make is tiny.qwen2_5_vl else chat(model)
    models.parts(model)[part].register_forward_hook(lambda *_: clock.pass_(1000))
    found = measure.latency({"slow": model}, inputs, new_tokens=2, repeats=3, warmup=1)["slow"]
    slow = {stage for stage in measure.STAGES if found[stage]["median"] >= 1000}
    assert slow == ({"prefill", "decode"} if part == "language" else {part})
    assert all(1000 <= found[stage]["median"] < 1010 for stage in slow)
    assert 1000 <= found["ttft"]["median"] < 1010


def test_latency_takes_variants_in_turn_and_leaves_no_hooks(house):
    log = []
    first, second = copy.deepcopy(house), quantize.bf16(house)
    second.model.vision_model.register_forward_hook(lambda *_: log.append("bf16 vision"))
    first.model.text_model.register_forward_hook(lambda *_: log.append("fp32"))
    second.model.text_model.register_forward_hook(lambda *_: log.append("bf16"))
    hooks = [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in x.modules()) for x in (first, second)]
    found = measure.latency({"fp32": first, "bf16": second}, chat(house), new_tokens=1, repeats=1, warmup=1)
    fp32, bf16 = ["fp32"] * 2, ["bf16 vision", "bf16", "bf16"]  # a prefill and a token; pixels in each model's own dtype
    assert log == fp32 + bf16 + bf16 + fp32
    assert hooks == [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in x.modules()) for x in (first, second)]
    assert list(found) == ["fp32", "bf16"]


@pytest.mark.parametrize("make", [tiny.house, tiny.llava, tiny.qwen2_5_vl])
def test_what_is_timed_is_what_generate_does(make):
    """The loop by hand picks the tokens that the library's generate() picks."""
    model = make()
    inputs = dict(qwen(model) if make is tiny.qwen2_5_vl else chat(model))
    wanted = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(wanted) == 5
    assert [logits.argmax().item() for logits in heads(model, inputs)] == wanted


def test_cast_follows_the_model(house):
    found = measure.cast(quantize.bf16(house), {**chat(house), "name": "kept"})
    assert found["pixel_values"].dtype == torch.bfloat16
    assert found["input_ids"].dtype == torch.long
    assert found["name"] == "kept"
    assert measure.cast(nf4(house), chat(house))["pixel_values"].dtype == torch.float32


# ---- where time goes, and what a precision can give


def test_stage_budget_counts_the_vision_tower_as_on_paper(house):
    rows = {r["stage"]: r for r in measure.stage_budget(house, chat(house), new_tokens=3)}
    assert list(rows) == list(measure.STAGES)
    patches, d = 64, 128
    weights = 3 * 16 * 16 * d + 4 * d * d + 2 * 4 * d * d  # patches, attention, MLP
    products = 2 * 2 * patches * patches * d  # scores, and the mean of the values
    assert rows["vision"]["gflop"] == pytest.approx((2 * patches * weights + products) / 1e9)
    assert (rows["vision"]["tokens"], rows["connector"]["tokens"]) == (64, 64)
    assert (rows["decode"]["calls"], rows["decode"]["tokens"]) == (3, 3)
    assert rows["prefill"]["tokens"] == chat(house)["input_ids"].numel()
    assert sum(r["share"] for r in rows.values()) == pytest.approx(1)
    json.dumps(list(rows.values()))


@pytest.mark.parametrize("make", [tiny.house, tiny.llava])
def test_stage_budget_agrees_with_torchs_counter(make):
    model = make()
    model.set_attn_implementation("eager")  # attention as products that torch's own counter knows on a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**chat(model), logits_to_keep=1)
    found = sum(r["gflop"] for r in measure.stage_budget(model, chat(model), 1) if r["stage"] != "decode")
    assert found == pytest.approx(counter.get_total_flops() / 1e9)


def test_stage_budget_of_an_attention_kernel_equals_the_plain_one(house):
    plain = copy.deepcopy(house)
    plain.set_attn_implementation("eager")
    kernel, eager = (measure.stage_budget(m, chat(house), 1) for m in (house, plain))
    assert [r["gflop"] for r in kernel] == pytest.approx([r["gflop"] for r in eager])


@pytest.mark.parametrize("shrink", [quantize.dynamic_int8, nf4])
def test_stage_budget_of_quantized_layers(house, shrink):
    """The same products, of fewer bytes."""
    small, whole = (measure.stage_budget(m, chat(house), 2) for m in (shrink(house), house))
    assert [r["gflop"] for r in small] == pytest.approx([r["gflop"] for r in whole])
    assert all(s["weight_bytes"] < 0.6 * w["weight_bytes"] for s, w in zip(small, whole, strict=True))


def test_stage_budget_reads_every_weight_once_a_call(house):
    rows = {r["stage"]: r for r in measure.stage_budget(house, chat(house), 2)}
    held = {}
    for r in measure.parameters(house):
        held[r["part"]] = held.get(r["part"], 0) + r["bytes"]
    assert rows["vision"]["weight_bytes"] == held["vision"]
    assert rows["connector"]["weight_bytes"] == held["connector"]
    row = 4 * house.config.text_config.hidden_size  # of the embedding, which the head reads whole: they are tied
    assert rows["decode"]["weight_bytes"] == 2 * (held["language"] + row)


def test_stage_budget_without_a_picture(house):
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert [r["stage"] for r in measure.stage_budget(house, text, 1)] == ["prefill", "decode"]


def test_stage_budget_of_a_connector_inside_the_tower():
    model = tiny.qwen2_5_vl()
    rows = {r["stage"]: r for r in measure.stage_budget(model, qwen(model), 1)}
    merger = sum(p.numel() for n, p in model.named_parameters() if ".merger." in n and n.endswith("weight") and p.ndim == 2)
    assert rows["connector"]["gflop"] == pytest.approx(2 * 4 * merger / 1e9)
    assert rows["connector"]["tokens"] == 4


def test_roofline_follows_its_two_roofs(house):
    fast = measure.roofline(house, chat(house), PEAKS | {"bandwidth": 1e9})
    slow = measure.roofline(house, chat(house), PEAKS | {"bandwidth": 1e-9})
    order = [(stage, p) for stage in measure.STAGES for p in ("fp32", "bf16", "int8", "int4")]
    assert [(r["stage"], r["precision"]) for r in fast] == order
    assert {r["bound_by"] for r in fast} == {"compute"}
    assert {r["bound_by"] for r in slow} == {"memory"}
    assert [r["at_most"] for r in fast] == pytest.approx([1, 2, 4, 4] * 4)  # int4 computes at the best peak
    assert [r["at_most"] for r in slow] == pytest.approx([1, 2, 4, 8] * 4)
    assert fast[0]["bound_ms"] == pytest.approx(fast[0]["gflop"] / 100 * 1e3)
    assert slow[0]["bound_ms"] == pytest.approx(slow[0]["weight_bytes"] / 1e-9 / 1e6, rel=1e-5)
    assert fast[0]["weight_bytes"] == 4 * sum(r["parameters"] for r in measure.parameters(house) if r["part"] == "vision")
    json.dumps(fast)


def test_roofline_leaves_out_what_has_no_kernel(house):
    rows = measure.roofline(house, chat(house), PEAKS | {"int8": 0.0})
    assert {r["precision"] for r in rows} == {"fp32", "bf16", "int4"}
