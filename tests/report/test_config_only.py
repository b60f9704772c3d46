"""What config.json alone tells equals what the loaded model says: bytes, FLOP, KV cache, visual tokens; and errors."""

import json
import os

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache, MistralConfig, Qwen2_5_VLConfig, SmolVLMConfig

import programs
import tiny
from mmrecipes import measure, models
from mmrecipes.errors import UserError
from mmrecipes.export import BACKENDS
from mmrecipes.models import loading, modules
from mmrecipes.quantize.groups import pack
from mmrecipes.report import config_only, doctor, predicted
from tests import families

QUESTION = "What is in this image?"
HOUSE = models.data_dir() / "models" / "mini-vlm"
MAKERS = (tiny.house, tiny.llava, tiny.idefics2, tiny.qwen2_5_vl, tiny.qwen3_vl, tiny.minicpm, tiny.blip2)


def skeleton(config, folder):
    """The model of `config`, from a directory that holds nothing but config.json."""
    config.save_pretrained(folder)
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    return loading.skeleton(folder)


def by_part(rows, key):
    found = {}
    for row in rows:
        found[row["part"]] = found.get(row["part"], 0) + row[key]
    return found


@pytest.fixture(scope="module")
def house():
    return models.load("mini-vlm")


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_parts_and_bytes_are_those_of_the_real_model(make, tmp_path):
    real = make()
    model = skeleton(real.config, tmp_path)
    assert all(p.is_meta for p in model.parameters())
    *rows, total = predicted.parts(model, predicted.weights(model))
    measured = measure.parameters(real)
    assert by_part(rows, "parameters") == by_part(measured, "parameters")
    assert by_part(rows, "fp32") == by_part(measured, "bytes")
    assert total["parameters"] == sum(p.numel() for p in real.parameters())
    assert total["bf16"] == pytest.approx(measure.model_bytes(real.bfloat16()), rel=0.02)


def test_quantized_bytes_are_those_of_the_quantized_house_model(house):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = loading.skeleton("mini-vlm")
    total = predicted.parts(model, predicted.weights(model))[-1]
    assert total["fp32"] == measure.model_bytes(house)
    half = models.clone(house).bfloat16()
    assert total["bf16"] == pytest.approx(measure.model_bytes(half), rel=0.02)
    packed = [pack(m.weight.float(), 4) for _, m in modules.linears(half)]
    linear = sum(m.weight.nbytes for _, m in modules.linears(half))
    four = measure.model_bytes(half) - linear + sum(q.nbytes + 2 * scale.size for q, scale in packed)
    assert total["int4"] == pytest.approx(four, rel=0.02)
    free = dict(modules.linears(half))
    quantize_(half, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name in free)
    assert total["int8"] == pytest.approx(measure.model_bytes(half), rel=0.02)


def test_published_counts_of_real_sizes(tmp_path):
    """Qwen2.5-VL-7B-Instruct has 8,292,166,656 parameters, SmolVLM-256M-Instruct 256,484,928, as their files say."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    qwen = skeleton(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False), tmp_path / "qwen")
    total = predicted.parts(qwen, predicted.weights(qwen))[-1]
    assert total["parameters"] == 8_292_166_656
    assert predicted.kv_cache(qwen)["bf16"] == 2 * 2 * 28 * 4 * 128
    short, long = predicted.serving(qwen, total, total["bf16"] + 10**9)
    assert (short["context"], long["context"]) == (1024, 4096)
    assert short["bf16"]["bytes_per_user"] == 1024 * 57_344 and long["bf16"]["bytes_per_user"] == 4096 * 57_344
    assert short["bf16"]["users_per_gb"] == short["bf16"]["users_here"] == 17 and long["bf16"]["users_here"] == 4
    assert short["fp32"]["bytes_per_user"] == 2 * short["bf16"]["bytes_per_user"] and short["fp32"]["users_here"] == 0
    assert any("3420 inputs" in f.what for f in config_only.findings(qwen))
    decode = {"stage": "decode", "gflop": 10.0, "bytes": dict.fromkeys(predicted.PRECISIONS, 10**9), "layers": 28}
    peaks = {"fp32": 100.0, "bf16": 400.0, "int8": 800.0, "bandwidth": 20.0}
    one, eight, _ = predicted.throughput(qwen, decode, 1000, peaks)
    assert one["bf16"] == {"tokens_per_s": pytest.approx(20), "bound_by": "memory"}  # 1 GB at 20 GB/s; 10 of 400 GFLOP/s
    step = max(8 * 10 / 400, (10**9 + 7 * 1000 * 57_344) / 20e9)
    assert eight["bf16"] == {"tokens_per_s": pytest.approx(8 / step), "bound_by": "compute"}
    assert eight["int8"] == {"tokens_per_s": pytest.approx(8 / 0.1), "bound_by": "compute"}
    assert one["fp32"]["bound_by"] == "compute" and eight["fp32"]["tokens_per_s"] == pytest.approx(10)
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49280}
    text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 512, "patch_size": 16}
    smol = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, tie_word_embeddings=False)
    smol = skeleton(smol, tmp_path / "smol")
    assert predicted.parts(smol, predicted.weights(smol))[-1]["parameters"] == 256_484_928


@pytest.mark.parametrize("make", [None, tiny.llava], ids=["mini-vlm", "llava"])
def test_tokens_flop_and_cache_are_those_of_the_real_model(make, house, tmp_path):
    real, path = (house, HOUSE) if make is None else (make(), tiny.save(make(), tmp_path / "saved"))
    wide = tmp_path / "wide.png"
    Image.new("RGB", (300, 90), "red").save(wide)
    model = loading.skeleton(path)
    rows, why = config_only.visual_tokens(model, QUESTION, wide)
    assert why is None and len(rows) == len(config_only.SIZES) + 1
    inputs = models.chat(real, wide, QUESTION)
    assert rows[-1]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert rows[-1]["visual_tokens"] == int((inputs["input_ids"] == real.config.image_token_id).sum()) > 0

    peaks = {"fp32": 100.0, "bf16": 200.0, "int8": 400.0, "bandwidth": 10.0}
    measured = {r["stage"]: r["gflop"] for r in measure.roofline(real, inputs, peaks) if r["precision"] == "fp32"}
    found = {r["stage"]: r["gflop"] for r in predicted.work(model, predicted.weights(model), rows[-1])}
    assert found == {stage: pytest.approx(gflop, rel=0.05) for stage, gflop in measured.items()}

    cache = DynamicCache(config=real.config)
    with torch.no_grad():
        modules.parts(real)["language"](input_ids=inputs["input_ids"], past_key_values=cache, use_cache=True)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert predicted.kv_cache(model)["fp32"] == held / inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", families.CHATS)
def test_every_family_is_diagnosed_as_its_loaded_model_would_be(family):
    path = families.family_dir(family)
    real, model = models.load(path).requires_grad_(False), loading.skeleton(path)
    rows, why = config_only.visual_tokens(model, QUESTION, None)
    assert why is None
    for row in rows:
        inputs = models.chat(real, Image.new("RGB", (row["width"], row["height"]), "gray"), QUESTION)
        assert row["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert row["visual_tokens"] == int((inputs["input_ids"] == real.config.image_token_id).sum()) > 0
    *parts, _ = predicted.parts(model, predicted.weights(model))
    measured = measure.parameters(real)
    assert by_part(parts, "parameters") == by_part(measured, "parameters")
    assert by_part(parts, "fp32") == by_part(measured, "bytes")
    assert all(row["gflop"] > 0 for row in predicted.work(model, predicted.weights(model), rows[-1]))
    peaks = {"fp32": 100.0, "bf16": 200.0, "int8": 400.0, "bandwidth": 10.0}
    inputs = {k: v for k, v in inputs.items() if k != "labels"}  # PaliGemma's processor adds them
    exact = {r["stage"]: r["gflop"] for r in measure.roofline(real, inputs, peaks) if r["precision"] == "fp32"}
    found = {r["stage"]: r["gflop"] for r in predicted.work(model, predicted.weights(model), rows[-1])}
    differs = {"qwen3_5": ["prefill"], "idefics2": ["connector"], "minicpmv4_6": ["vision", "prefill"]}.get(family, [])
    for stage in differs:  # what `work` says that it leaves out
        del found[stage], exact[stage]
    assert found == {stage: pytest.approx(gflop, rel=0.1) for stage, gflop in exact.items()}


def test_a_user_of_a_sliding_window_needs_no_more_than_the_window(tmp_path):
    config = tiny.llava().config
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config.text_config = MistralConfig(
        num_hidden_layers=3, vocab_size=config.text_config.vocab_size, sliding_window=1500, **sizes
    )
    model = skeleton(config, tmp_path)
    assert predicted.kv_cache(model)["layers"] == {"all": 0, "window": 3, "state": 0}
    short, long = predicted.serving(model, {"fp32": 0, "bf16": 0}, 10**9)
    token = 2 * 2 * 16 * 3 * 2  # keys and values, heads, head size, layers, bytes
    assert (short["bf16"]["bytes_per_user"], long["bf16"]["bytes_per_user"]) == (1024 * token, 1500 * token)


def test_an_image_in_tiles_is_counted_as_such(tmp_path):
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    model = skeleton(tiny.house().config, tmp_path)
    split = Idefics3ImageProcessorPil(size={"longest_edge": 512}, max_image_size={"longest_edge": 128}, do_image_splitting=True)
    house = tiny.processor()
    template = house.chat_template
    model.processor = Idefics3Processor(split, house.tokenizer, house.image_seq_len, chat_template=template)
    row = config_only.prompt(model, Image.new("RGB", (512, 256)), QUESTION)
    assert row["tiles"] == 9 and row["visual_tokens"] == 9 * house.image_seq_len
    patch = model.config.vision_config.patch_size
    assert row["patches"] == 9 * (128 // patch) ** 2


def test_a_prediction_is_its_largest_bound():
    work = [
        {"stage": "vision", "gflop": 2.0, "bytes": dict.fromkeys(predicted.PRECISIONS, 10**6), "layers": 10},
        {"stage": "prefill", "gflop": None, "bytes": dict.fromkeys(predicted.PRECISIONS, 10**3), "layers": 1000},
        {"stage": "decode", "gflop": 0.001, "bytes": dict.fromkeys(predicted.PRECISIONS, 10**8), "layers": 1},
    ]
    peaks = {"fp32": 100.0, "bf16": 200.0, "int8": 0.0, "bandwidth": 10.0}
    vision, prefill, ttft, decode = predicted.predict(work, peaks, 5.0)
    assert vision["fp32"] == {"ms": pytest.approx(20), "bound_by": "compute"}
    assert vision["int8"]["ms"] == vision["int4"]["ms"] == pytest.approx(10), "without an int8 kernel: the best peak"
    assert prefill["bf16"] == {"ms": pytest.approx(5), "bound_by": "launch"}
    assert decode["int4"] == {"ms": pytest.approx(10), "bound_by": "memory"}
    assert ttft["stage"] == "ttft" and ttft["fp32"] == {"ms": pytest.approx(25), "bound_by": "compute"}
    notes = list(config_only.will_not_pay(["avx2"], peaks, [vision, prefill, ttft, decode]))
    assert [note.split(":")[0] for note in notes] == ["int8", "bf16", "4-bit weights", "all, in eager PyTorch"]
    assert not any(n.startswith("int8") for n in config_only.will_not_pay(["avx_vnni"], peaks, [vision, ttft, decode]))


def test_shapes_that_stand_in_the_way_are_named(tmp_path):
    config = tiny.house().config
    config.text_config.hidden_size = 72
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    model = skeleton(config, tmp_path)
    model.model.pool = nn.MultiheadAttention(64, 2, device="meta")
    found = {(f.technique, f.where): f for f in config_only.findings(model)}
    assert "awq" in found["all", "config.json"].what
    assert "past its layer" in found["dynamic int8, 4-bit layers", "model.pool.out_proj"].what
    assert "rows of 72" in found["int8 and 4-bit embeddings", "model.text_model.embed_tokens"].what
    assert "72 outputs" in found["NF4", "model.connector.modality_projection.proj"].what
    assert any("72 inputs do not divide by 32" in f.what for f in found.values())
    assert ("4-bit weights", "lm_head") in found
    # what no group divides is held as int8, the pooled attention's output in bf16
    packed = {id(w.tensor): w for w in predicted.weights(model)}
    odd = packed[id(model.model.text_model.layers[0].self_attn.q_proj.weight)].bytes
    assert odd["int4"] == odd["int8"] < odd["bf16"]
    pooled = packed[id(model.model.pool.out_proj.weight)].bytes
    assert pooled["int4"] == pooled["bf16"]


def test_one_verdict_a_runtime_with_and_without_weights(tmp_path):
    for make in (tiny.house, tiny.llava, tiny.qwen2_5_vl):
        real = make()
        model = skeleton(real.config, tmp_path / make.__name__)
        if hasattr(real, "processor"):
            model.processor = real.processor
        assert doctor.exports(model) == doctor.exports(real)
        assert [e.runtime for e in doctor.exports(model)] == ["torch", *BACKENDS]
    bare = skeleton(tiny.llava().config, tmp_path / "bare")
    assert {e.supported for e in doctor.exports(bare) if e.runtime != "torch"} == {None}


def test_what_is_no_vlm_or_unknown_is_one_line(tmp_path):
    for name, content, words in (
        ("bert", {"model_type": "bert"}, "not a vision-language model"),
        ("clip", {"model_type": "clip"}, "compares images with texts"),
        ("new", {"model_type": "nonsense"}, "nonsense"),
        ("broken", {"model_type": "llava", "vision_config": {"model_type": "nonsense"}}, "config.json"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=words) as e:
            config_only.examine(tmp_path / name, QUESTION)
        assert "\n" not in str(e.value)


def run(*args, cwd):
    return programs.run(["-m", "mmrecipes.cli", "doctor", *args], cwd, os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "60"})


def test_the_command_prints_text_to_paste_or_one_json_object(tmp_path):
    model = tmp_path / "a-model"
    real = tiny.llava()
    real.config.save_pretrained(model)
    real.processor.save_pretrained(model)
    done = run(model, "--config-only", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    for words in ("What it holds", "connector", "KV cache", "ttft", "decode", "executorch", "Tokens of one image", "Serving"):
        assert words in done.stdout
    done = run(model, "--config-only", "--json", "--question", "One two three four five six?", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["parts"][-1]["parameters"] == sum(p.numel() for p in real.parameters())
    assert {e["runtime"] for e in found["exports"]} == {"torch", "onnx", "openvino", "executorch", "openvino-genai"}
    assert [row["visual_tokens"] for row in found["visual_tokens"]] == [16] * len(config_only.SIZES)
    for file in model.iterdir():
        if file.name != "config.json":
            file.unlink()
    done = run(model, "--config-only", cwd=tmp_path)
    assert done.returncode == 0 and "not known: the tokenizer's files are missing" in done.stdout
    (model / "config.json").unlink()
    (model / "else.txt").write_text("")
    done = run(model, "--config-only", cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "config.json" in done.stderr


def test_json_of_a_whole_model(tmp_path):
    tiny.save(tiny.llava(), tmp_path / "llava")
    done = run("llava", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert {"parts", "findings", "verdicts", "capabilities", "exports"} <= set(found)
    assert {v["stage"] for v in found["verdicts"]} == {"vision", "prefill", "decode"}
