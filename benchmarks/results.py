"""Measures what results/ and the README say, on this machine. Some hours on two cores: `make results`, or
one job by its name: `python benchmarks/results.py plan`.

- results/mini-vlm.json: accuracy of the committed model on the whole test split, per family, beside the majority floors
- results/damage.json: how it breaks: rounding to few bits and pruning, against fp32 on the same questions
- results/plan.json: mixed precision under a byte budget against one width for all, on the whole test split
- results/calibrated.json: GPTQ, AWQ and searched scales against round-to-nearest, at few bits, on the whole test split
- results/modality.json: a language model calibrated on text alone, on pictures and text, and with both weighed alike
- results/int8.json, int8-speed.json: int8 with activations, by library: accuracy; time on the real-size twin (benchmarks/int8.py)
- results/static.json: mini-cnn in static int8, by observer, calibration set and runtime (benchmarks/static.py)
- results/exported.json: mini-vlm exported to ONNX Runtime and OpenVINO, by precision (benchmarks/exported.py)
- results/pruned.json: zeros: magnitude, Wanda, SparseGPT, 2:4, recovered, rounded (benchmarks/pruned.py)
- results/structured.json: a smaller model, recovered with and without its parent (benchmarks/structured.py)
- results/tokens.json, tokens-speed.json: fewer visual tokens: accuracy; time on the real-size twin (benchmarks/visual_tokens.py)
- results/mini-siglip.json: the committed dual encoder: retrieval, matching, zero-shot naming
- results/student.json: a student of mini-vlm, taught and on labels alone (benchmarks/student.py)
- results/dual.json: a smaller dual encoder, taught and on pairs alone (benchmarks/dual_encoder.py)
- results/swap.json: mini-vlm with other vision encoders (benchmarks/swap.py)
- results/lora.json: new words, 4-bit and pruned models learned by adapters and by all weights (benchmarks/lora.py)
- results/qat.json: training at few bits after GPTQ, with labels or a teacher, of all or a part (benchmarks/qat.py)
- results/together.json: pruning, tokens, distillation, quantization in every order, exported, timed (benchmarks/together.py)
- results/bench.json: the real-size twin in every runtime, beside the peers (`make bench`, benchmarks/bench.py)
- results/tour.json: the tour's comparison, with 1,000 questions
- results/real-size.json: stage budget and roofline of the real-size twin, fp32, on this machine
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from datasets import Dataset

from mmrecipes import data, evaluate, measure, models, prune, quantize
from mmrecipes.data import scenes
from mmrecipes.mini import model as mini_model
from mmrecipes.report import tour

RESULTS = Path(__file__).resolve().parent.parent / "results"
DAMAGE = {  # name -> what is done to a copy of the model
    "int8 per channel": lambda m: quantize.simulate(m, 8),
    "4 bits per channel": lambda m: quantize.simulate(m, 4),
    "3 bits per channel": lambda m: quantize.simulate(m, 3),
    "4 bits per tensor": lambda m: quantize.simulate(m, 4, "tensor"),
    "3 bits per tensor": lambda m: quantize.simulate(m, 3, "tensor"),
    "2 bits in groups of 32": lambda m: quantize.simulate(m, 2, "group"),
    "magnitude pruning 50%": lambda m: prune.magnitude(m, 0.5),
    "magnitude pruning 70%": lambda m: prune.magnitude(m, 0.7),
}

METHODS = {
    "round to nearest": lambda w, h, bits, group: quantize.round_to_nearest(
        w, bits, "group" if group else "channel", group or 32
    ),
    "searched scale": lambda w, h, bits, group: quantize.search_round(w, bits, group),
    "AWQ": quantize.awq_round,
    "GPTQ": quantize.gptq_round,
}


def write(name: str, content: dict) -> None:
    models.write_json(RESULTS / name, {"environment": measure.environment(), **content})
    print("wrote", RESULTS.name + "/" + name, flush=True)


def accuracy() -> None:
    """The committed model and its damaged copies, each on all 4,200 questions."""
    rows, model = data.test_split(), models.load("mini-vlm")
    base = evaluate.vqa(model, rows)
    parts = measure.parameters(model)
    write(
        "mini-vlm.json",
        {"overall": base.overall, "families": base.families, "floors": base.floors, "parameters": parts},
    )
    found = {}
    for name, damage in DAMAGE.items():
        hurt = evaluate.vqa(damage(model), rows)
        found[name] = {"accuracy": hurt.overall, "change": evaluate.paired(base.right, hurt.right), "families": hurt.families}
        print(f"{name:24s} {hurt.overall}  {found[name]['change']}", flush=True)
    write("damage.json", {"variants": found})


def the_plan() -> None:
    """Plans and uniform widths at the same bytes, all rounded by GPTQ; plans are made from validation questions."""
    rows, model, seen = data.test_split(), models.load("mini-vlm"), data.calibration(64)
    probe, units = data.questions("validation", 140), list(quantize.units(model))
    base, reference = evaluate.vqa(model, rows), evaluate.answer_logits(model, probe)[0]
    found, whole = {}, measure.model_bytes(model)
    costs = quantize.sensitivity(model, probe, (8, 4, 3, 2), rounding=quantize.gptq_rounding(model, seen))
    no_data = quantize.sensitivity(model, probe, (4, 3, 2))

    def record(name: str, chosen: dict[str, int], group: int | None = None, seen: Dataset | None = seen) -> None:
        small, size = quantize.apply_plan(model, chosen, group, seen), quantize.plan_bytes(model, chosen, group)
        hurt, moved = evaluate.vqa(small, rows), evaluate.divergence(reference, evaluate.answer_logits(small, probe)[0])
        found[name] = {
            **{"mb": size / 1e6, "times_smaller": whole / size, "divergence": moved, "bits": chosen, "group": group},
            **{"accuracy": hurt.overall, "change": evaluate.paired(base.right, hurt.right), "families": hurt.families},
        }
        print(f"{name:36s} {size / 1e6:.2f} MB {moved:.4f} {hurt.overall} {found[name]['change']}", flush=True)

    def size(bits: int, group: int | None = None) -> int:
        return quantize.plan_bytes(model, dict.fromkeys(units, bits), group)

    rest = size(8) - sum(c.bytes for c in costs if c.bits == 8)  # norms, biases, the patch convolution
    for bits, group in ((4, None), (3, None), (2, 32), (2, None)):
        record(f"uniform {bits} bits" + (f", groups of {group}" if group else ""), dict.fromkeys(units, bits), group)
    record("plan, bytes of 2 bits in groups of 32", quantize.knapsack(costs, size(2, 32) - rest))
    record("greedy plan, the same bytes", quantize.greedy(costs, size(2, 32) - rest))
    record("plan, 7x smaller than fp32", quantize.knapsack(costs, whole // 7 - rest))
    record("plan, bytes of 3 bits", quantize.knapsack(costs, size(3) - rest))
    record("no data: uniform 3 bits", dict.fromkeys(units, 3), seen=None)
    record("no data: plan, bytes of 3 bits", quantize.knapsack(no_data, size(3) - rest), seen=None)
    sweeps = {"GPTQ": [dataclasses.asdict(c) for c in costs], "no data": [dataclasses.asdict(c) for c in no_data]}
    write("plan.json", {"fp32": base.overall, "variants": found, "sweeps": sweeps})


def the_calibrated() -> None:
    """What looking at data recovers, where plain rounding loses most."""
    rows, model, seen = data.test_split(), models.load("mini-vlm"), data.calibration(64)
    base, found = evaluate.vqa(model, rows), {}
    for bits, group in ((3, None), (2, 32)):
        for how, method in METHODS.items():
            hurt = evaluate.vqa(quantize.calibrate(model, seen, bits, method, group), rows)
            name = f"{bits} bits, {f'groups of {group}' if group else 'a scale a channel'}: {how}"
            found[name] = {"accuracy": hurt.overall, "change": evaluate.paired(base.right, hurt.right)}
            print(f"{name:48s} {hurt.overall}  {found[name]['change']}", flush=True)
    about = f"{len(seen)} pictures with question and answer; linear layers only, embeddings in 16 bits"
    write("calibrated.json", {"calibration": about, "fp32": base.overall, "variants": found})


def the_modality() -> None:
    """On what should a VLM's language model be calibrated? It alone is rounded, to 2 bits in groups of 32."""
    rows, model, seen = data.test_split(), models.load("mini-vlm"), data.calibration(64)
    language = {name: 2 for name, _ in models.linears(model) if "text_model" in name}
    sets = {"pictures and text": (seen, False), "balanced": (seen, True), "text only": (seen.remove_columns("image"), False)}
    base, found = evaluate.vqa(model, rows), {}
    for how in ("AWQ", "GPTQ"):
        for name, (data_set, balance) in sets.items():
            hurt = evaluate.vqa(quantize.calibrate(model, data_set, language, METHODS[how], 32, balance), rows)
            found[f"{how}, {name}"] = {"accuracy": hurt.overall, "change": evaluate.paired(base.right, hurt.right)}
            print(f"{how}, {name:20s} {hurt.overall}  {found[f'{how}, {name}']['change']}", flush=True)
    about = f"{len(seen)} pictures with question and answer; the language model's linear layers, 2 bits in groups of 32"
    write("modality.json", {"calibration": about, "fp32": base.overall, "variants": found})


def the_int8() -> None:
    """int8 for transformers: accuracy of each way on the test split."""
    import int8

    write("int8.json", int8.accuracy())


def the_int8_speed() -> None:
    """int8 for transformers: time of each way on the real-size twin."""
    import int8

    write("int8-speed.json", int8.speed())


def the_static() -> None:
    """Static int8 of mini-cnn: observers, calibration sets, runtimes."""
    import static

    write("static.json", static.run())


def the_exported() -> None:
    import exported

    write("exported.json", exported.run())


def the_pruned() -> None:
    """Zeros instead of weights, on the test split."""
    import pruned

    write("pruned.json", pruned.run())


def the_structured() -> None:
    """Columns, heads and layers cut out, and recovered, on the test split."""
    import structured

    write("structured.json", structured.run())


def the_tokens() -> None:
    """Fewer visual tokens: what each way costs, on the test split."""
    import visual_tokens

    write("tokens.json", visual_tokens.accuracy())


def the_tokens_speed() -> None:
    """Fewer visual tokens: time on the real-size twin."""
    import visual_tokens

    write("tokens-speed.json", visual_tokens.speed())


def the_siglip() -> None:
    """Whether picture and caption find each other, on the test split's scenes."""
    model = models.load("mini-siglip")
    write(
        "mini-siglip.json", {"parameters": sum(p.numel() for p in model.parameters()), **evaluate.retrieval_report(model, 4000)}
    )


def the_student() -> None:
    """A quarter of the parameters, taught and untaught, on the test split."""
    import student

    write("student.json", student.run())


def the_dual() -> None:
    """Less than 40% of mini-siglip's parameters: do picture and caption still find each other?"""
    import dual_encoder

    write("dual.json", dual_encoder.run())


def the_swap() -> None:
    """Other vision encoders for mini-vlm: what they cost in answers, and save in time."""
    import swap

    write("swap.json", swap.run())


def the_lora() -> None:
    """Adapters: what is learned and what forgotten, on floats, on 4 bits and on zeros."""
    import lora

    write("lora.json", lora.run())


def the_qat() -> None:
    """Quantization-aware training against GPTQ, at the same bytes."""
    import qat

    write("qat.json", qat.run())


def the_together() -> None:
    """Keeps each row and training as it goes, in runs/together: about two hours, an idle machine for the times."""
    import together

    write("together.json", together.run())


def real_size() -> None:
    """Where a real model's time goes; random weights, so time and memory only."""
    twin = mini_model.real_size("smolvlm-256m")
    inputs = models.chat(twin, scenes.render(scenes.make_scene(1), 512), "What colour is the large circle in this picture?")
    peaks = measure.machine_peaks()
    write(
        "real-size.json",
        {
            "model": "smolvlm-256m twin, random weights, fp32, one picture of 512 px, 8 new tokens",
            "budget": measure.stage_budget(twin, inputs, 8),
            "peaks": peaks,
            "roofline": measure.roofline(twin, inputs, peaks),
            "memory": measure.peak_memory(twin, inputs),
        },
    )


def the_tour() -> None:
    found = tour.run(out=Path("tour.html"), n=1000)
    for row in found.rows:
        del row["predictions"]
    found.save(RESULTS / "tour.json")


if __name__ == "__main__":
    jobs = {
        "accuracy": accuracy,
        "plan": the_plan,
        "calibrated": the_calibrated,
        "modality": the_modality,
        "int8": the_int8,
        "int8-speed": the_int8_speed,
        "static": the_static,
        "exported": the_exported,
        "pruned": the_pruned,
        "structured": the_structured,
        "tokens": the_tokens,
        "tokens-speed": the_tokens_speed,
        "siglip": the_siglip,
        "student": the_student,
        "dual": the_dual,
        "swap": the_swap,
        "lora": the_lora,
        "qat": the_qat,
        "together": the_together,
        "tour": the_tour,
        "real-size": real_size,
    }
    for job in sys.argv[1:] or jobs:
        jobs[job]()
