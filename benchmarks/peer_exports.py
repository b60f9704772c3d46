"""What other quantizers make of the twin, for bench.py: ONNX Runtime's own on a plain export, and NNCF."""

from __future__ import annotations

from pathlib import Path


def plain_onnx(model, out: Path, how: str) -> None:
    """As the exporters write it, with no fusion but those of ONNX Runtime's own optimizer in "fused-int8", and then the runtime's
    own quantizer with its defaults."""
    import torch
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    from mmrecipes import export
    from mmrecipes.export import wrappers
    from mmrecipes.export.onnx import strip_metadata
    from mmrecipes.quiet import library_logs

    out.mkdir()
    tower, picture = wrappers.vision_wrapper(model)
    module, example, axes = wrappers.language_wrapper(model)
    graphs = {"vision": out / "vision.onnx", "language": out / "language.onnx"}
    with library_logs(), torch.no_grad():
        torch.onnx.export(tower.eval(), (picture,), dynamo=True, verbose=False).save(graphs["vision"], external_data=False)
        config = OnnxConfig(dynamic_shapes=axes, prefer_deferred_runtime_asserts_over_guards=True)
        program = OnnxExporter().export(module, example, config).program
        import onnx_ir

        onnx_ir.save(program, str(graphs["language"]))
        for graph in graphs.values():
            if how == "fused-int8":
                fuse(graph, model.config)
            if how.endswith("int8"):
                quantize_dynamic(graph, graph)
            elif how == "int4":
                found = MatMulNBitsQuantizer(str(graph))
                found.process()
                found.model.save_model_to_file(str(graph))
    for graph in graphs.values():
        strip_metadata(graph)
    export.write_manifest(model, out, "onnx", {"vision": how, "language": how})


def fuse(graph: Path, config) -> None:
    """By ONNX Runtime's transformer optimizer, in place. It finds the norms and biases of both graphs; attention it finds in
    neither, whichever of its model types is named."""
    import logging

    from onnxruntime.transformers.optimizer import optimize_model

    part, kind = (config.vision_config, "vit") if graph.stem == "vision" else (config.text_config, "gpt2")
    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    found = optimize_model(str(graph), kind, num_heads=part.num_attention_heads, hidden_size=part.hidden_size, opt_level=0)
    for data in graph.parent.glob(f"{graph.name}.data"):
        data.unlink()
    found.save_model_to_file(str(graph))


def plain_openvino(model, out: Path, how: str) -> None:
    import nncf
    import openvino as ov

    from mmrecipes import export
    from mmrecipes.export import openvino

    # from our graph, whose attention OpenVINO keeps whole: so weights alone are compared, and the peer is at its best
    mode = {"int8": {}, "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64}}[how]  # 128 does not divide 576
    out.mkdir()
    openvino.write_openvino(model, out, {"vision": "fp32", "language": "fp32"}, [])
    for part in export.PARTS:
        small = nncf.compress_weights(ov.Core().read_model(out / f"{part}.xml"), **mode)
        ov.save_model(small, out / "small.xml", compress_to_fp16=False)
        for ending in ("xml", "bin"):
            (out / f"small.{ending}").replace(out / f"{part}.{ending}")
    export.write_manifest(model, out, "openvino", {"vision": how, "language": how})
