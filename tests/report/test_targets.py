"""The hardware table: what it claims of our own measurements is in results/, and this machine's row is marked."""

import json

import onnx
import pytest
from onnx import TensorProto, helper

from mmrecipes.errors import UserError
from mmrecipes.export import onnx as onnx_export
from mmrecipes.report import targets
from paths import ROOT


def results(name):
    return json.loads((ROOT / "results" / name).read_text())


def test_the_row_of_avx2_is_what_was_measured():
    found = results("int8-speed.json")
    assert "avx2" in found["environment"]["capabilities"] and "avx512_vnni" not in found["environment"]["capabilities"]
    for stage in found["stages"].values():
        assert stage["torch quantize_dynamic"]["faster"]["fp32"] > 1.2
    many = [stage["torch bf16"]["faster"]["fp32"] for name, stage in found["stages"].items() if "one token" not in name]
    assert max(many) < 0.8 and found["stages"]["one token, no cache"]["torch bf16"]["faster"]["fp32"] > 1.2


def test_the_row_of_vnni_is_what_was_measured():
    found = results("bench.json")
    assert {"avx512_vnni", "avx512_bf16"} <= set(found["environment"]["capabilities"])
    row = {each["name"]: each for each in found["rows"]}
    fp32, int8, int4 = (row[f"ours: ONNX Runtime {precision}"] for precision in ("fp32", "int8", "int4"))
    assert fp32["ttft_ms"] > 1.5 * int8["ttft_ms"] and fp32["tokens_per_s"] < int8["tokens_per_s"] < int4["tokens_per_s"]
    assert int4["ttft_ms"] > 0.9 * int8["ttft_ms"]
    assert row["PyTorch fp32, eager"]["ttft_ms"] > 1.5 * row["PyTorch bf16, eager"]["ttft_ms"]


def test_the_row_of_nvidia_is_what_was_measured():
    found = results("gpu.json")
    assert found["peaks"]["bf16"] > 5 * found["peaks"]["fp32"]
    rate = {row["variant"]: row["tokens_per_s"]["median"] for row in found["generation"] if row["model"] == "SmolVLM-256M"}
    assert rate["bf16, eager"] < 1.3 * rate["fp32, eager"] < rate["bf16, static KV cache, compiled"]


def test_every_row_has_a_source_and_files_of_ours_exist():
    for target in targets.TARGETS:
        assert target.source
        if target.source.startswith("results/"):
            assert (ROOT / target.source.split(" ")[0].rstrip(";")).is_file()
        else:
            assert target.source.endswith("not measured here")


@pytest.mark.parametrize(
    ("capabilities", "gpu", "name"),
    [
        (["sse4_2", "avx2"], None, "x86 with AVX2"),
        (["avx2", "avx512_vnni"], None, "x86 with VNNI"),
        (["neon", "asimddp"], None, "ARM with dotprod, i8mm"),
        ([], "some GPU", "NVIDIA tensor cores"),
    ],
)
def test_this_machines_row_is_marked(capabilities, gpu, name):
    found = targets.here(capabilities, gpu)
    assert found[:1] == [name] and "x86 with AMX" not in found
    lines = targets.target_table(capabilities, gpu).splitlines()
    marked = [line for line in lines[2:] if line.startswith("> ")]
    assert marked[0].startswith(f"> {name}") and len(marked) == len(found)
    assert max(map(len, lines)) <= 100 and sum("Source:" in line for line in lines) <= len(targets.TARGETS)


def graph(tmp_path, shape, domain=""):
    node = helper.make_node("Relu", ["x"], ["y"], domain=domain)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:]), opset_imports=opsets)
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_one_shape_and_standard_operators_alone_are_static(tmp_path):
    assert onnx_export.check_static(graph(tmp_path, (1, 3, 8, 8))) == {"x": [1, 3, 8, 8]}
    with pytest.raises(UserError, match="'x' has open dimensions"):
        onnx_export.check_static(graph(tmp_path, ("images", 3)))
    with pytest.raises(UserError, match=r"Relu .* is an operator of com\.microsoft"):
        onnx_export.check_static(graph(tmp_path, (1, 3), "com.microsoft"))
    (tmp_path / "no.onnx").write_text("no")
    with pytest.raises(UserError, match="not an ONNX file"):
        onnx_export.check_static(tmp_path / "no.onnx")
