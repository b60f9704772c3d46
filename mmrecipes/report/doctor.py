"""What will break or not pay off on this model and this machine, before you start: `mmrecipes doctor MODEL`.

Nothing is guessed from names: the model answers one question about one image while every operation is watched, and each
technique is timed on a layer of the shape that costs most.
"""

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmrecipes.errors import UserError, one_line
from mmrecipes.export import pipeline
from mmrecipes.inference.backends import PACKAGES
from mmrecipes.measure import machine, size, timing
from mmrecipes.models import modules as models_modules
from mmrecipes.models import preflight, prompts
from mmrecipes.quantize import nf4, rounding
from mmrecipes.report import dtype_checks, plain, predicted, targets
from mmrecipes.report.dtype_checks import TIED, Finding

GROUPS = (32, 64, 128)
OWN = ("aten", "prim", "prims", "profiler", "inductor")  # PyTorch's own operators; every runtime and quantizer knows these


@dataclass(frozen=True)
class Verdict:
    """One technique on one stage of this model, on this machine: will it run, and how much faster was its costliest layer?"""

    technique: str
    stage: str
    runs: bool
    faster: float  # than fp32 eager, on the layer shape with most work
    layer: str
    steady: bool = True  # whether the times that this rests on varied little


@dataclass(frozen=True)
class Export:
    """Whether `mmrecipes shrink` can write this model for one runtime, and why not; None where only the weights can tell."""

    runtime: str
    supported: bool | None
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """Parts (as `measure.parameters`), what stands in the way, what would run and pay, this CPU's capabilities, exports; and what
    a server needs for each user (as `predicted.serving`)."""

    parts: list[dict]
    findings: list[Finding]
    verdicts: list[Verdict]
    capabilities: list[str] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    serving: list[dict] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Notes which linear layers' weights are read by others than the layer itself."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.owner = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.inside: list[str] = []
        self.read: dict[str, str] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for value in (*args, *(kwargs or {}).values()):
            name = self.owner.get(id(value))
            if name is not None and (not self.inside or self.inside[-1] != name):
                what = getattr(func, "__self__", func)
                self.read.setdefault(name, getattr(what, "__name__", str(what)))
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Counts operators that are not PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.foreign: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace not in OWN:
            self.foreign[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _hooks(model: nn.Module, watch: _Watch, tokens: dict[str, list[int]]) -> Iterator[None]:
    """Tell `watch` which linear layer runs; note in `tokens` how many rows of input each call of a layer has."""
    names = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}

    def enter(layer: nn.Module, *_: object) -> None:
        if layer in names:
            watch.inside.append(names[layer])

    def leave(layer: nn.Module, args: tuple, _: object) -> None:
        if layer in names:
            watch.inside.pop()
            if args and isinstance(args[0], Tensor):
                tokens.setdefault(names[layer], []).append(args[0].numel() // max(1, args[0].shape[-1]))

    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True):
        yield


def examine(model: nn.Module, inputs: Mapping) -> Diagnosis:
    """Run `model` once on `inputs` (as from `models.chat`) and look at all that happens; time what could replace it."""
    watch, operators, tokens = _Watch(model), _Operators(), {}
    with torch.no_grad(), _hooks(model, watch, tokens), operators, watch:
        model(**inputs)
    known = list(dtype_checks.dtype_findings(model))
    read = [f for f in _direct_reads(model, watch) if f.where not in {k.where for k in known}]  # what no source told
    findings = [*known, *read, *_foreign(operators), *norms(model), *odd_groups(model), *_dtypes(model)]
    findings += _overflows(model, inputs)
    capabilities = machine.environment()["capabilities"]
    held = predicted.parts(model, predicted.weights(model))[-1]
    free = preflight.free_memory() + size.model_bytes(model)  # as before it was loaded
    users = [] if getattr(model.config, "is_encoder_decoder", False) else predicted.serving(model, held, free)
    verdicts = _verdicts(model, tokens, findings)
    return Diagnosis(size.parameters(model), findings, verdicts, capabilities, exports(model), users)


def exports(model: nn.Module) -> list[Export]:
    """One verdict a runtime, from what `export.supported` says before any work; `model` may be a skeleton without weights."""
    able, layers = nf4.can_nf4(model), dict(models_modules.linears(model))
    found = [Export("torch", bool(able), f"NF4 fits {len(able)} of {len(layers)} linear layers; the others stay in bf16")]
    for runtime in pipeline.BACKENDS:
        missing = "" if importlib.util.find_spec(PACKAGES[runtime]) else f"; {PACKAGES[runtime]} is not installed here"
        try:
            with next(model.parameters()).device:
                pipeline.supported(model, runtime)
            checks = "`export.export`" if runtime == "openvino-genai" else "`mmrecipes shrink`"
            found.append(Export(runtime, True, f"as an architecture; {checks} checks its answers{missing}"))
        except UserError as e:
            if "processor" in str(e) and getattr(model, "processor", None) is None:
                found.append(Export(runtime, None, "only with the processor's files can it be told"))
            else:
                found.append(Export(runtime, False, str(e).removeprefix("export: ")))
        except Exception as e:  # a module that is built otherwise, or an operation that needs weights
            on_meta = next(model.parameters()).is_meta and not isinstance(e, AttributeError)
            what = "only its weights can tell" if on_meta else "not supported yet"
            found.append(Export(runtime, None if on_meta else False, f"{what} ({one_line(e, 80)})"))
    return found


def export_text(found: list[Export]) -> str:
    """The verdicts as a table."""
    words = {True: "yes", False: "no", None: "not known"}
    return plain.table("Export", ("runtime", "takes it", "why"), [(e.runtime, words[e.supported], e.why) for e in found])


def serving_text(rows: list[dict]) -> str:
    """The rows of `predicted.serving` as a table."""
    head = ("tokens a user", "MB fp32", "MB bf16", "users a GB fp32", "bf16", "users here fp32", "bf16")
    body = []
    for row in rows:
        each = [row[precision] for precision in ("fp32", "bf16")]
        mb = [f"{e['bytes_per_user'] / 1e6:,.1f}" for e in each]
        users = [["-" if e[key] is None else f"{e[key]:,}" for e in each] for key in ("users_per_gb", "users_here")]
        body.append((f"{row['context']:,}", *mb, *users[0], *users[1]))
    note = "a user: one conversation's KV cache; a GB: of what is left after the weights; here: all free memory, less the weights"
    return plain.table("Serving", head, body) + "\n" + plain.paragraph(note)


def resists(module: nn.Module, pixels: Tensor) -> list[Finding]:
    """What in a vision module keeps it from static int8: group norms, and custom operators seen on one run on `pixels`."""
    operators = _Operators()
    with torch.no_grad(), operators:
        module(pixels)
    return [*_foreign(operators), *norms(module)]


def _direct_reads(model: nn.Module, watch: _Watch) -> Iterator[Finding]:
    tied = models_modules.tied_heads(model)
    for name, how in watch.read.items():
        if name not in tied:
            what = f"its weight is read from outside ({how}): a quantized layer in its place would break or be passed by"
            yield Finding("dynamic int8, 4-bit layers", name, what, "leave it out, or call the layer instead of its weight")
        else:
            yield Finding("4-bit weights", name, *TIED)


def _foreign(operators: _Operators) -> Iterator[Finding]:
    for name, count in operators.foreign.items():
        what = f"a custom operator, called {count}x: no quantizer or exporter knows it"
        cure = "write it in PyTorch's operators, or tell the exporter what it is (custom_translation_table)"
        yield Finding("static int8, export", name, what, cure)


def norms(model: nn.Module) -> Iterator[Finding]:
    """Norms that static int8 can't fold away."""
    for name, m in model.named_modules():
        if isinstance(m, nn.GroupNorm | nn.InstanceNorm2d):
            what = f"{type(m).__name__} can't be folded into a convolution, as batch norm can: it stays in floating point"
            yield Finding("static int8", name, what, "replace it by a batch norm, retrain shortly, and fold that")


def odd_groups(model: nn.Module) -> Iterator[Finding]:
    """Linear layers whose inputs some usual group of weights does not divide."""
    for name, m in models_modules.linears(model):
        fits = [g for g in GROUPS if m.in_features % g == 0]
        if len(fits) < len(GROUPS):
            what = f"{m.in_features} inputs do not divide by {', '.join(str(g) for g in GROUPS if g not in fits)}"
            cure = f"use groups of {fits[-1]}" if fits else "pad the inputs, or use one scale a channel"
            yield Finding("4-bit weights in groups", name, what, cure)


def _dtypes(model: nn.Module) -> Iterator[Finding]:
    found = Counter(str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point())
    if len(found) > 1:
        yield Finding("all", "parameters", f"mixed dtypes: {dict(found)}", "load with one dtype")
    elif "float32" not in found:
        what = f"they are {next(iter(found))}; eager int8 starts from float32"
        yield Finding("dynamic int8", "parameters", what, "load with dtype=torch.float32")


def _overflows(model: nn.Module, inputs: Mapping) -> Iterator[Finding]:
    """Where outputs are not finite: as loaded, and in fp16 where the checkpoint was saved in that."""
    if where := prompts.first_not_finite(model, inputs):
        yield Finding("all", where, f"its output is not finite in {model.dtype}", "load it in bfloat16, or mend its weights")
    elif getattr(model, "saved_dtype", None) == "float16":
        half = models_modules.clone(model).half()
        if where := prompts.first_not_finite(half, timing.cast(half, inputs)):
            yield Finding("fp16", where, "its output is not finite: fp16 ends at 65504", "load it in bfloat16")


def _verdicts(model: nn.Module, tokens: dict[str, list[int]], findings: list[Finding]) -> list[Verdict]:
    """The layer shape with most work of each stage, timed as fp32, bf16 and dynamic int8, with that stage's tokens."""
    layers, parts, work = dict(model.named_modules()), models_modules.part_of(model), Counter()
    stages = {"vision": ("vision",), "connector": ("vision",), "language": ("prefill", "decode")}
    for name, calls in tokens.items():
        layer = layers[name]
        for stage in stages.get(parts.get(f"{name}.weight", "other"), ()):
            rows = 1 if stage == "decode" else max(calls)
            work[stage, rows, layer.in_features, layer.out_features] += rows * layer.in_features * layer.out_features
    blocked = any(f.technique.startswith("dynamic int8") for f in findings)
    found = []
    for stage in ("vision", "prefill", "decode"):
        shapes = [key for key in work if key[0] == stage]
        if not shapes:
            continue
        _, rows, inputs, outputs = max(shapes, key=work.get)
        ms = _time_layer(rows, inputs, outputs)
        shape = f"{inputs} x {outputs}, {rows} token{'s' if rows > 1 else ''}"
        for technique in ("bf16", "dynamic int8"):
            own, fp32 = ms[technique], ms["fp32"]
            steady = all(t["high"] < 4 / 3 * t["low"] for t in (own, fp32))
            runs = technique == "bf16" or not blocked
            found.append(Verdict(technique, stage, runs, fp32["low"] / own["low"], shape, steady))
    return found


def _time_layer(rows: int, inputs: int, outputs: int) -> dict[str, dict]:
    x, layer = torch.randn(rows, inputs), nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    half, int8 = rounding.bf16(layer), rounding.dynamic_int8(layer)
    runs = {"fp32": (layer, x), "bf16": (half, x.bfloat16()), "dynamic int8": (int8, x)}
    with torch.inference_mode():
        return timing.wall({k: lambda m=m, x=x: m(x) for k, (m, x) in runs.items()}, repeats=9)


def show(found: Diagnosis) -> None:
    """Print a diagnosis as plain text of at most 100 columns."""
    rows = [(row["part"], row["dtype"], f"{row['parameters']:,}", f"{row['bytes'] / 1e6:,.1f}") for row in found.parts]
    print(plain.table("What it holds", ("part", "dtype", "parameters", "MB"), rows))
    print("\n" + plain.paragraph("this CPU has: " + (" ".join(found.capabilities) or "no vector instructions that we know")))
    head = ("technique", "stage", "will it run", "against fp32", "its costliest layer")
    rows = []
    for v in found.verdicts:
        pays = f"{v.faster:.2f}x {'pays' if v.faster > 1.1 else 'does not pay'}{'' if v.steady else '?'}"
        rows.append((v.technique, v.stage, "yes" if v.runs else "no, see below", pays, v.layer))
    print("\n" + plain.table("Will it run, will it pay", head, rows))
    if not all(v.steady for v in found.verdicts):
        print(plain.paragraph("?: times varied by more than a third, so the machine was busy: repeat when it is idle"))
    if found.serving:
        print("\n" + serving_text(found.serving))
    print("\n" + export_text(found.exports))
    print("\n" + targets.target_table(found.capabilities, torch.cuda.get_device_name() if torch.cuda.is_available() else None))
    print("\n" + plain.findings(finding_rows(found.findings)))


def finding_rows(findings: list[Finding]) -> list[tuple[str, str, str, str]]:
    """Technique, where, what and cure: a row for all findings that differ only in the place."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for f in findings:
        places.setdefault((f.technique, f.what, f.cure), []).append(f.where)
    more = {key: f" and {len(where) - 1} more" if len(where) > 1 else "" for key, where in places.items()}
    return [(key[0], where[0] + more[key], *key[1:]) for key, where in places.items()]
