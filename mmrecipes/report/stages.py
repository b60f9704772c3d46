"""Where two versions of a model part: `mmrecipes compare A B` takes an answer stage by stage and names the first that differs.

From the second stage on both are given the same input, what A's processor made, and A's tokens so far: a difference in one stage
does not hide in the next. Nothing else is put right: the stages after the first difference show what it leads to.
A PyTorch model runs the library's own code; its visual tokens are what its decoder gets in the place of image placeholders.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmrecipes.data import scenes
from mmrecipes.errors import ParityError, UserError, one_line
from mmrecipes.evaluate import statistics
from mmrecipes.export import pipeline
from mmrecipes.inference import exported, optimum
from mmrecipes.inference.dual import ExportedDual
from mmrecipes.models import images as models_images
from mmrecipes.models import loading, modules, prompts
from mmrecipes.report import plain

STAGES = ("preprocessing", "vision encoder", "connector", "first logits", "decode steps", "answers")
EQUAL = 1e-5  # relative difference that the order of float32 sums makes
MAX_TOKENS = 12  # of an answer

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Trace:
    """One answer: what the connector reads (N, D) and the visual tokens (T, D), None where not shown; tokens, and the logits
    (V) before each of them."""

    encoded: np.ndarray | None
    visual: np.ndarray | None
    tokens: list[int]
    logits: list[np.ndarray]


@dataclass(frozen=True)
class Side:
    """One of the two: `prepare` is its own preprocessing (images, question), `run` answers greedily, or along given tokens."""

    name: str
    prepare: Callable[[list[Image.Image], str], Inputs]
    run: Callable[[Inputs, list[int] | None], Trace]


def load_side(name: str) -> Side:
    """What is at `name`: an export of ours, the files of optimum or transformers.js, else what `models.load` takes.
    Raises UserError as these do."""
    folder = Path(name).expanduser()
    if any((folder / manifest).is_file() for manifest in (exported.MANIFEST, exported.OLD_MANIFEST)):
        model = exported.load_exported(folder)
        if isinstance(model, ExportedDual):
            raise UserError(f"{name}: compares images with texts and has no stages; give a VLM")
    elif folder.is_dir() and optimum.find_graphs(folder):
        model = optimum.load_optimum(folder)
    else:
        model = loading.load(name)

        def prepare(images: list[Image.Image], question: str) -> Inputs:
            return {key: value.numpy() for key, value in prompts.chat(model, images or None, question).items()}

        return Side(name, prepare, functools.partial(run_torch, model))
    return Side(name, model.inputs, functools.partial(run_graphs, model))


def run_torch(model: nn.Module, inputs: Inputs, tokens: list[int] | None) -> Trace:
    """The library's own `generate`, watched: what the connector reads, and what replaces the placeholders of images."""
    found, given = modules.parts(model), {k: torch.from_numpy(np.asarray(v)) for k, v in inputs.items()}
    places, start = given["input_ids"][0] == getattr(model.config, "image_token_id", -1), given["input_ids"].shape[1]
    read: list[np.ndarray] = []
    visual: list[np.ndarray] = []

    def note_encoded(_, args: tuple, kwargs: dict) -> None:
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        read.append(hidden.reshape(-1, hidden.shape[-1]).float().numpy())

    def note_visual(_, args: tuple, kwargs: dict) -> None:
        embeds = kwargs.get("inputs_embeds")
        if not visual and embeds is not None and embeds.shape[1] == len(places):  # the prompt; DeepStack has more beside it
            deeper = kwargs.get("deepstack_visual_embeds") or ()
            visual.append(torch.cat([embeds[0, places], *deeper], dim=-1).float().numpy())

    hooks = [found["language"].register_forward_pre_hook(note_visual, with_kwargs=True)]
    hooks += [found["connector"].register_forward_pre_hook(note_encoded, with_kwargs=True)] if "connector" in found else []
    options = pipeline.GREEDY | {"max_new_tokens": MAX_TOKENS}
    if tokens is not None:  # the scores of all others are masked, the logits are kept as they were
        options |= {"max_new_tokens": len(tokens), "prefix_allowed_tokens_fn": lambda _, ids: [tokens[len(ids) - start]]}
    try:
        with torch.inference_mode():
            made = model.generate(**given, **options)
    finally:
        for hook in hooks:
            hook.remove()
    encoded = np.concatenate(read) if read else None
    shown = visual[0] if visual and places.any() else None
    return Trace(encoded, shown, made.sequences[0, start:].tolist(), [row[0].float().numpy() for row in made.logits])


def run_graphs(model: exported.Exported, inputs: Inputs, tokens: list[int] | None) -> Trace:
    """As `run_torch`, for graphs; what the connector reads lies within one of them."""
    inputs = dict(inputs)
    visual = model.encode_images(inputs) if "pixel_values" in inputs else None
    logits, made = [model.prefill(inputs)], []
    room = model.manifest["max_length"] - inputs["input_ids"].shape[1] + 1  # the last token needs no place
    for i in range(min(room, MAX_TOKENS if tokens is None else len(tokens))):
        if i:
            logits.append(model.graphs.step(np.array([made[-1:]])))
        if not np.isfinite(logits[-1]).all():
            break
        made.append(model.likeliest(logits[-1], [*inputs["input_ids"][0], *made]) if tokens is None else tokens[i])
        if tokens is None and made[-1] in model.manifest["eos_token_ids"]:
            break
    return Trace(None, visual, made, logits)


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference, relative to that of `wanted`; infinite where shapes differ or a number is not finite."""
    if found.shape != wanted.shape or not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return math.inf
    apart, size = (float(np.linalg.norm(each.astype(np.float64))) for each in (found - wanted, wanted))
    return apart / size if size else math.inf if apart else 0.0


def examine(a: Side, b: Side, conversations: Sequence[list[Image.Image]], question: str, tolerance: float = 1e-3) -> dict:
    """All that `show` prints, as one JSON object: stages with their largest relative difference, the first that differs, and how
    many answers and tokens are the same. Raises UserError where one cannot take what the other's processor made."""
    rows: dict[str, list[float | None]] = {stage: [] for stage in STAGES}
    notes, same, agree, steps = {}, [], 0, 0
    for images in conversations:
        try:
            inputs = dict(a.prepare(images, question))
        except (UserError, ValueError):
            if images:
                raise
            continue  # some processors (PaliGemma's) take no text without an image
        apart, why = _preprocessing(inputs, dict(b.prepare(images, question)))
        if why:
            notes["preprocessing"] = why
        try:
            wanted = a.run(inputs, None)
            if not wanted.tokens:
                raise ParityError(f"{a.name}: its first logits are not finite; give the other one first")
            found, own = b.run(inputs, wanted.tokens), b.run(inputs, None)
        except UserError:
            raise
        except Exception as e:  # whatever a model makes of inputs that are not its own
            raise UserError(f"{a.name} and {b.name} cannot take the same inputs ({one_line(e, 80)}); compare like models") from e
        rows["preprocessing"].append(apart)
        for stage, x, y in (("vision encoder", found.encoded, wanted.encoded), ("connector", found.visual, wanted.visual)):
            rows[stage].append(None if x is None or y is None else distance(x, y))
        errors = [distance(x, y) for x, y in zip(found.logits, wanted.logits, strict=False)]
        rows["first logits"].append(errors[0])
        rows["decode steps"].append(max(errors[1:], default=None))
        top = [int(x.argmax()) == int(y.argmax()) for x, y in zip(found.logits, wanted.logits, strict=False)]
        agree, steps = agree + sum(top), steps + len(top)
        same.append(own.tokens == wanted.tokens)
        rows["answers"].append(0.0 if same[-1] else math.inf)
    share = statistics.wilson(sum(same), len(same))
    notes["decode steps"] = f"the likeliest token is the same in {agree} of {steps}"
    notes["answers"] = f"{sum(same)} of {len(same)} are the same, 95% interval {100 * share.low:.0f}-{100 * share.high:.0f}%"
    return _summary(a, b, rows, notes, tolerance) | {"answers": vars(share), "tokens": {"same": agree, "n": steps}}


def _preprocessing(wanted: Inputs, found: Inputs) -> tuple[float, str]:
    """Relative difference of the inputs that both processors make, infinite where whole numbers differ; and what differs."""
    apart, why = 0.0, ""
    for name in sorted(wanted.keys() & found.keys(), key=lambda n: (n != "input_ids", n)):
        x, y = np.asarray(found[name]), np.asarray(wanted[name])
        whole = x.shape != y.shape or not np.issubdtype(y.dtype, np.floating)
        gap = (0.0 if np.array_equal(x, y) else math.inf) if whole else distance(x, y)
        if gap > apart:
            shapes = f"{x.shape} instead of {y.shape}" if x.shape != y.shape else "other values"
            apart, why = gap, f"{name}: {shapes if whole else f'at most {np.abs(x - y).max():.2g} apart'}"
    lacking = [n for n in ("input_ids", "pixel_values") if (n in wanted) != (n in found)]
    return (math.inf, f"{lacking[0]}: one side has none") if lacking else (apart, why)


def _summary(a: Side, b: Side, rows: dict[str, list[float | None]], notes: dict[str, str], tolerance: float) -> dict:
    stages, first = [], None
    for stage, values in rows.items():
        known = [value for value in values if value is not None]
        most = max(known, default=None)
        verdict = "not compared" if most is None else "differs" if most > tolerance else "equal" if most <= EQUAL else "close"
        note = notes.get(stage, "") or ("" if known else "not shown by both" if stage in STAGES[1:3] else "answers of one token")
        finite = [value if value is None or math.isfinite(value) else None for value in values]
        row = {"stage": stage, "difference": most if known and math.isfinite(most) else None, "verdict": verdict, "note": note}
        stages.append(row | {"by_conversation": finite})
        first = first or (stage if verdict == "differs" else None)
    return {"a": a.name, "b": b.name, "tolerance": tolerance, "stages": stages, "first": first}


def show(found: dict) -> None:
    """Print the table of stages, and one sentence that names the first that differs."""
    rows = [
        (row["stage"], "-" if row["difference"] is None else f"{row['difference']:.1e}", row["verdict"], row["note"])
        for row in found["stages"]
    ]
    print(plain.table(f"{found['b']} against {found['a']}", ("stage", "largest difference", "verdict", ""), rows) + "\n")
    print(plain.paragraph(sentence(found)))


def sentence(found: dict) -> str:
    """What the table comes to."""
    if found["first"] is None:
        return f"Nothing differs by more than {found['tolerance']:g} (relative)."
    verdicts = {row["stage"]: row["verdict"] for row in found["stages"]}
    hidden = found["first"] == "connector" and verdicts["vision encoder"] == "not compared"
    more = ", or the vision encoder before it, which is not shown by both" if hidden else ""
    return f"The first stage that differs is {found['first']}{more}."


def conversations(folder: Path | None, n: int) -> list[list[Image.Image]]:
    """Images of `n` conversations: one each from `folder`; else drawn: square, wide, tall, two at once, none, then more."""
    if folder is not None:
        return [[image] for _, image in models_images.load_images(folder)[:n]]
    sizes = ((256, 256), (512, 224), (160, 480))
    shown = pipeline.shown()
    return (shown + [[scenes.render(scenes.make_scene(seed), 256).resize(sizes[seed % 3])] for seed in range(4, n)])[:n]
