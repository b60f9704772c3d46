"""mini-vlm with another vision encoder: features first, then the connector, then everything; accuracy, matching, speed.

`run()` returns what results/swap.json says; `python benchmarks/swap.py NAME` trains one encoder alone, so that several can learn
side by side. Trainings and rows are kept in runs/swap as they go: a killed run goes on there. Up to an hour for each encoder on
one core. A tree with other code: remove that folder first.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from structured import Kept, answers
from torch import nn

from mmrecipes import data, distill, evaluate, export, inference, measure, models, train
from mmrecipes.data import scenes
from mmrecipes.distill.encoders import swapped
from mmrecipes.export import onnx, wrappers
from mmrecipes.mini import cnn, curriculum

WORK = Path(__file__).resolve().parent.parent / "runs" / "swap"
FEATURES = {  # from nothing, and from the weights of mini-cnn, which names what lies in each place (notebook 12)
    "ShuffleNetV2 1.0x": train.TrainConfig(2400, 32, 0.02, 4e-3),
    "MobileNetV2 0.5": train.TrainConfig(1600, 32, 0.01, 2e-3),
}
CALIBRATION = 512  # pictures for the linear map that the second one begins with; of these 64 for int8
CONNECTOR = train.TrainConfig(60, 16, 0.004, 1e-3)
ALL = train.TrainConfig(200, 16, 0.001, 3e-4)
SMALLER, SEEN = "ViT, smaller", 64  # the house's own, sliced (notebook 23), on so many pictures
SIZE = {"vision": distill.StudentSize((0, 1, 2, 3), 128, 192)}
VISION, AFTER = train.TrainConfig(600, 32, 0.002, 5e-4), train.TrainConfig(100, 16, 0.0007, 2e-4)
LAST = {"ShuffleNetV2 1.0x": ("stages.2", "backbone.top")}  # where rounding costs most: few places, many channels
FEWER = 1050  # questions for what is on its way, and for what answers one at a time
PICTURES = (96, 224, 512)  # px


def stages(name: str, work: Path = WORK, shrink: int = 1) -> dict[str, nn.Module]:
    """The model after each stage of its training with the encoder `name`."""
    teacher, at = models.load("mini-vlm"), work / name.split()[0].lower().strip(",")
    if name == SMALLER:
        student = distill.make_student(teacher, SIZE, data.calibration(SEEN))
        vision, after = _shorter(VISION, shrink), _shorter(AFTER, shrink)
        first = distill.match_vision_encoder(student, teacher, _images(vision), vision, at / "features")
        return {"features": first, "all": distill.distill(first, teacher, _chats(teacher, after), after, work=at / "all")}
    start, images = None, None
    if name == "MobileNetV2 0.5":
        start, images = house_cnn().mobilenet_v2, cnn.images("calibration", CALIBRATION // shrink)
    blank = distill.swap_vision_encoder(teacher, distill.ENCODERS[name], start)
    features, connector, everything = (_shorter(config, shrink) for config in (FEATURES[name], CONNECTOR, ALL))
    first = distill.match_features(blank, teacher, _images(features), features, at / "features", images)
    chats = curriculum.chat_batches("connector", connector, teacher.processor.tokenizer)
    second = distill.align_connector(first, teacher, chats, connector, at / "connector")
    third = distill.distill(second, teacher, _chats(teacher, everything), everything, work=at / "all")
    return {"features": first, "connector": second, "all": third}


def _images(config: train.TrainConfig) -> Sequence:
    return curriculum.image_batches("encoder-swap", config)


def _chats(teacher: nn.Module, config: train.TrainConfig) -> Sequence:
    return curriculum.chat_batches("encoder-swap", config, teacher.processor.tokenizer)


def house_cnn() -> nn.Module:
    """`mini-cnn`, float32."""
    from transformers import AutoModelForSemanticSegmentation

    path = models.data_dir() / "models" / "mini-cnn"
    return AutoModelForSemanticSegmentation.from_pretrained(path, dtype=torch.float32).eval()


def _shorter(config: train.TrainConfig, shrink: int) -> train.TrainConfig:
    return replace(config, steps=max(2, config.steps // shrink))


def run(work: Path = WORK, n: int | None = None, shrink: int = 1) -> dict:
    """Accuracy of every stage, paired with the teacher's; matching; time by picture size and runtime. Less with `n`, `shrink`."""
    teacher, rows, kept = models.load("mini-vlm"), data.test_split(n), Kept(work)
    few, asked = rows.select(range(min(FEWER, len(rows)))), min(1000, n or 1000)
    whole = {"teacher": teacher}
    kept.row("teacher", lambda: _answers(teacher, rows))
    for name in (*FEATURES, SMALLER):
        at = work / name.split()[0].lower().strip(",")
        for stage, model in stages(name, work, shrink).items():
            spent = train.read_log(at / stage)["seconds"][-1] / 60
            kept.row(
                f"{name}: {stage}", lambda m=model, s=stage, t=spent: _answers(m, rows if s == "all" else few) | {"minutes": t}
            )
        whole[name] = model
    for name, model in whole.items():
        kept.row(f"{name}: matching", lambda m=model: _matching(m, asked))
    kept.row("times, towers", lambda: _towers(teacher))
    with tempfile.TemporaryDirectory() as folder:
        kept.row("runtime", lambda: _runtimes(whole, few, Path(folder)))
        kept.row("runtime, OpenVINO", lambda: _openvino(whole, rows, Path(folder)))
        kept.row("OpenVINO, 1 thread", lambda: _openvino(whole, None, Path(folder), threads=1))
    return _content(kept.rows, whole, work)


def _answers(model: nn.Module, rows: Dataset) -> dict:
    tower = sum(p.numel() for p in models.parts(model)["vision"].parameters())
    return answers(model, rows) | {"tower": tower}


def _matching(model: nn.Module, n: int) -> dict:
    yes, both, right = evaluate.image_text_matching(model, n=n)
    return {"yes or no": asdict(yes), "told apart": asdict(both), "right": right}


def _towers(teacher: nn.Module) -> dict:
    """Milliseconds a picture in PyTorch, by encoder and side in px; random weights, on which times do not depend.

    In fp32, and in bf16 where the CPU has instructions for it.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    found: dict[str, dict] = {}
    dtypes = {"ms": torch.float32}
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(measure.environment()["capabilities"]):
        dtypes["ms bf16"] = torch.bfloat16
    for side in PICTURES:
        own = type(teacher.config.vision_config)(**teacher.config.vision_config.to_dict() | {"image_size": side})
        base = SiglipVisionModel(SiglipVisionConfig(image_size=side, vision_use_head=False))
        towers = {"mini-vlm's ViT": Idefics3VisionTransformer(own), "SigLIP-base": base}
        towers |= {name: swapped.BackboneEncoder(kind, side, side // 16) for name, kind in distill.ENCODERS.items()}
        runs = {}
        for key, dtype in dtypes.items():
            picture = torch.rand(1, 3, side, side, dtype=dtype)
            runs |= {(name, key): partial(models.clone(tower).to(dtype).eval(), picture) for name, tower in towers.items()}
        with torch.inference_mode():
            for (name, key), ms in measure.wall(runs, repeats=9).items():
                row = found.setdefault(name, {"parameters": sum(p.numel() for p in towers[name].parameters())})
                row.setdefault(key, {})[str(side)] = ms
    return found


def _runtimes(whole: dict[str, nn.Module], rows: Dataset, folder: Path) -> dict:
    """ONNX Runtime: each encoder in fp32 and in int8, its ranges found as it runs ("int8") or fixed on pictures ("static").

    Milliseconds a picture and for five whole questions, bytes, and the answers in int8.
    """
    pictures = [scenes.render(scenes.make_scene(s)) for s in data.SPLITS["calibration"][:64]]
    runs: dict[str, Callable] = {}
    loaded, sizes = {}, {}
    for name, model in whole.items():
        convolutions = hasattr(models.parts(model)["vision"], "backbone")
        for vision in ("fp32", "static") if convolutions else ("fp32", "int8", "static"):
            precisions = {"vision": vision, "language": "fp32" if vision == "fp32" else "int8"}
            given, key = pictures if vision == "static" else (), f"{name}, {vision}"
            at = export.export(model, folder / key, "onnx", precisions, images=given)
            loaded[key] = inference.load_exported(at)
            sizes[key] = sum(f.stat().st_size for f in at.glob("vision.onnx*"))
            runs[key] = partial(loaded[key].encode_images, _pixels(model, pictures[:1])[0])
            if convolutions and vision == "static" and (kept := LAST.get(name)):  # the same, its last convolutions in float
                key = f"{key} but for its last stage"
                other = folder / key
                shutil.copytree(at, other)
                for graph in other.glob("vision.onnx*"):
                    graph.unlink()
                seen = torch.from_numpy(np.concatenate(_pixels(model, pictures)))
                # once more: `export` leaves out of its graphs which module a node is of
                encoder, image = wrappers.vision_wrapper(model)
                floats = onnx.to_onnx(encoder, {"pixel_values": image}, folder / "floats.onnx", {})
                config = onnx.StaticConfig(layers="convolutions", keep=kept)
                onnx.static_int8(floats, seen.split(1), other / "vision.onnx", config)
                loaded[key] = inference.load_exported(other, check=False)  # its checksums are those of the other graph
                sizes[key] = sum(f.stat().st_size for f in other.glob("vision.onnx*"))
                runs[key] = partial(loaded[key].encode_images, _pixels(model, pictures[:1])[0])
    asked = [(r["image"], r["question"]) for r in rows.select(range(5))]
    questions = {k: partial(_each, e, asked) for k, e in loaded.items()}
    eyes, five = measure.wall(runs, repeats=51), measure.wall(questions, repeats=11)
    found = {k: {"ms": eyes[k], "five questions, ms": five[k], "bytes": sizes[k]} for k in loaded}
    for key in found:
        if not key.endswith("fp32"):
            found[key] |= answers(loaded[key], rows)
    return found


def _pixels(model: nn.Module, images: list) -> list[np.ndarray]:
    """What the vision wrapper takes, (1, 3, H, W) each: the images as the model's processor makes them."""
    return [run["pixel_values"] for image in images for run in wrappers.vision_inputs(model, [image])]


def _openvino(whole: dict[str, nn.Module], rows: Dataset | None, folder: Path, threads: int | None = None) -> dict:
    """OpenVINO, the language model in fp32: milliseconds a picture of each encoder by precision, and the answers in int8.

    Without `rows` no answers; with `threads`, on so many.
    """
    pictures = [scenes.render(scenes.make_scene(s)) for s in data.SPLITS["calibration"][:64]]
    loaded, runs, sizes = {}, {}, {}
    for name, model in whole.items():
        for vision in ("fp32", "bf16", "int8", "static"):
            key, given = f"{name}, {vision}", pictures if vision == "static" else ()
            at = folder / f"openvino {key}"
            if not at.exists():
                export.export(model, at, "openvino", {"vision": vision, "language": "fp32"}, images=given)
            loaded[key], sizes[key] = inference.load_exported(at, threads), sum(f.stat().st_size for f in at.glob("vision*"))
            runs[key] = partial(loaded[key].encode_images, _pixels(model, pictures[:1])[0])
    found = {k: {"ms": ms, "bytes": sizes[k]} for k, ms in measure.wall(runs, repeats=51).items()}
    for key in (k for k in found if rows and k.endswith(("int8", "static"))):
        found[key] |= answers(loaded[key], rows)
    return found


def _each(model: inference.Exported, asked: list) -> None:
    for picture, question in asked:
        model.generate(picture, question, 8)


def _content(rows: dict, whole: dict[str, nn.Module], work: Path) -> dict:
    base, variants, matching = rows["teacher"]["right"], {}, {}
    for name, row in rows.items():
        if name.endswith(": matching"):
            key = name.removesuffix(": matching")
            matching[key] = {k: v for k, v in row.items() if k != "right"}
            matching[key]["change"] = evaluate.paired(rows["teacher: matching"]["right"], row["right"])
        elif "right" in row:
            variants[name] = {k: v for k, v in row.items() if k != "right"}
            variants[name]["change"] = evaluate.paired(base[: len(row["right"])], row["right"])
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in whole.items()}
    for name in (*FEATURES, SMALLER):
        last = variants[f"{name}: all"]
        before = rows.get(f"{name}: connector", rows[f"{name}: features"])["right"]
        last["against the step before"] = evaluate.paired(before, rows[f"{name}: all"]["right"][: len(before)])
        last["share"] = parameters[name] / parameters["teacher"]
        last["minutes in all"] = sum(r["minutes"] for n, r in variants.items() if n.startswith(f"{name}: "))
    ran: dict[str, dict] = {"runtime": {}, "runtime, OpenVINO": {}, "OpenVINO, 1 thread": {}}
    for where, (name, row) in ((w, item) for w in ran for item in rows[w].items()):
        ran[where][name] = {k: v for k, v in row.items() if k not in ("right", "families")}
        if "right" in row:
            ran[where][name]["change"] = evaluate.paired(base[: len(row["right"])], row["right"])
    logs = {}
    for name in (*FEATURES, SMALLER):
        at = work / name.split()[0].lower().strip(",")
        logs[name] = {p.name: {k: v[::20] for k, v in train.read_log(p).items()} for p in sorted(at.iterdir()) if p.is_dir()}
    return {
        "threads": torch.get_num_threads(),
        "variants": variants,
        "matching": matching,
        "towers": rows["times, towers"],
        **ran,
        "parameters": parameters,
        "logs": logs,
    }


if __name__ == "__main__":
    for given in sys.argv[1:]:
        stages(given)
