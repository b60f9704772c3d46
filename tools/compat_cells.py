"""One family of models through techniques and runtimes, for tools/compat.py: compat_cells.py FAMILY COLUMN,COLUMN OUT.

Each cell is {"result": works, refused or fails, "error": the largest relative error of the logits, "sentence": why not}.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import equality  # noqa: E402
import families  # noqa: E402
import programs  # noqa: E402
from mmrecipes import data, distill, evaluate, export, inference, models, prune, quantize, train  # noqa: E402
from mmrecipes.errors import ParityError, UserError, one_line  # noqa: E402
from mmrecipes.models.prompts import Rows  # noqa: E402
from mmrecipes.prune import token_dropping  # noqa: E402
from mmrecipes.report import doctor  # noqa: E402

EXACT = 1e-3  # relative error of the logits that an fp32 export may have
QUESTION = equality.QUESTION


class Differs(Exception):
    """It answers, and otherwise than it should."""


@dataclass
class Subject:
    """A family's directory and its model, and a few rows to calibrate on."""

    name: str

    @property
    def folder(self) -> Path:
        return families.family_dir(self.name)

    @cached_property
    def model(self) -> nn.Module:
        return models.load(self.folder)

    @cached_property
    def rows(self) -> Rows:
        return data.questions("train", 8, size=64)

    @property
    def image(self):  # -> PIL.Image.Image
        return equality.drawn(96, 48)

    def logits(self, model: nn.Module) -> Tensor:
        """Of the last token, or how alike two texts are to an image (V)."""
        if "head" in models.parts(model):
            inputs, output = models.chat(model, self.image, QUESTION), "logits"
        else:
            texts = {"text": ["red", "a blue circle"], "padding": "max_length", "max_length": 16}
            inputs, output = model.processor(images=[self.image], return_tensors="pt", **texts), "logits_per_image"
        with torch.inference_mode():
            return getattr(model(**inputs), output).flatten(0, -2)[-1].float()

    def error(self, changed: nn.Module) -> float:
        """Relative error of the logits that a changed model gives."""
        wanted, found = self.logits(self.model), self.logits(changed)
        if not torch.isfinite(found).all():
            raise ParityError("the logits are not finite")
        return float((found - wanted).norm() / wanted.norm())


def load(s: Subject) -> None:
    s.logits(s.model)


def examine(s: Subject) -> None:
    doctor.examine(s.model, models.chat(s.model, s.image, QUESTION))


def ask(s: Subject) -> None:
    models.ask(s.model, s.image, QUESTION)


def int8(s: Subject) -> float:
    return s.error(quantize.dynamic_int8(s.model))


def gptq4(s: Subject) -> float:
    return s.error(quantize.calibrate(s.model, s.rows, 4, group_size=32))


def pruned(s: Subject) -> None:
    """Zeros, layers and FFN neurons: what works and what does not."""
    scores: dict = {}

    def neurons(part: str) -> nn.Module:
        scores.update(scores or prune.magnitude_importance(s.model))
        half = len(scores[part]["neurons"][0]) // 2
        return prune.keep_ffn_neurons(s.model, {part: prune.strongest(scores[part]["neurons"], half)}, s.rows)

    _all_of(
        {
            "SparseGPT": lambda: s.error(prune.sparsegpt(s.model, s.rows, 0.5)),
            "language layers": lambda: s.error(shallower(s.model)),
            "FFN neurons, language": lambda: s.error(neurons("language")),
            "FFN neurons, vision": lambda: s.error(neurons("vision")),
        }
    )


def drop_tokens(s: Subject) -> None:
    images, questions = [s.image, equality.drawn(64, 64)], [QUESTION, "What is there?"]
    whole = token_dropping.answers(s.model, images, questions, 1.0, layer=1)
    if whole != evaluate.answers(s.model, images, questions, 1, progress=False):
        raise Differs("with all tokens kept the answers are others")
    token_dropping.answers(s.model, images, questions, 0.5, layer=1)


def shallower(model: nn.Module) -> nn.Module:
    """Without the last layer of the language model."""
    return prune.keep_layers(model, "language", range(model.config.get_text_config().num_hidden_layers - 1))


def distilled(s: Subject) -> None:
    config = train.TrainConfig(2, 4, 1e-3, 1e-3, device="cpu")
    if "head" in models.parts(s.model):
        batches = train.RowBatches(s.model, s.rows, config)
        s.error(distill.distill(shallower(s.model), s.model, batches, config))
    else:
        raise UserError("this cell is for models that answer; for two encoders there is distill.distill_dual")


def exported(s: Subject, runtime: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = export.export(s.model, Path(folder) / "out", runtime, "fp32")
        if "head" not in models.parts(s.model):
            return max(export.parity(s.model, inference.load_exported(out), EXACT).values())
        outcomes = list(equality.compare(s.model, inference.load_exported(out)))
    worst = max(o.error for o in outcomes)
    if other := [o.case for o in outcomes if o.found != o.wanted]:
        raise Differs(f"other tokens than PyTorch on: {', '.join(other)} (logits {worst:.1e} away)")
    if not worst <= EXACT:
        raise Differs(f"logits {worst:.1e} away, more than {EXACT}")
    return worst


def batch(s: Subject) -> None:
    sizes = [(96, 48), (40, 100), (64, 64)]
    asked = [equality.drawn(*size) for size in sizes], ["What?", QUESTION, "How many things are there?"]
    together, alone = (evaluate.answers(s.model, *asked, n, progress=False) for n in (3, 1))
    if together != alone:
        raise Differs(f"{sum(a != b for a, b in zip(together, alone, strict=True))} of 3 padded answers are not the single ones")


def sizes(s: Subject) -> None:
    for case in equality.cases()[: len(equality.SHAPES)]:
        _same_inputs(s.model, case)


def multi_image(s: Subject) -> None:
    _same_inputs(s.model, _case("two images"))


def multi_turn(s: Subject) -> None:
    for name in ("two turns", "an image a turn"):
        _same_inputs(s.model, _case(name))


def recipes(s: Subject) -> None:
    """Each recipe alone, without mmrecipes: how many run, and the last line of each that does not."""
    answers = "head" in models.parts(s.model)
    own = [p for p in sorted((ROOT / "recipes").glob("*.py")) if ("AutoModelForImageTextToText" in p.read_text()) == answers]
    env = os.environ | {"MODEL": str(s.folder), "PYTHONPATH": "", "MPLBACKEND": "agg"}
    env |= {"ENCODER": str(ROOT / "data" / "models" / "mini-cnn")}
    failed: dict[str, list[str]] = {}  # reason -> numbers of recipes
    refused = True
    for recipe in own:
        with tempfile.TemporaryDirectory() as folder:
            done = programs.run([recipe], Path(folder), env, blocked="mmrecipes")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
            refused &= "Traceback" not in done.stderr
            reason = re.sub(r"^MODEL=.*?(?:directory: |model \(|from it \()(.*?)\)?$", r"\1", lines[-1])
            failed.setdefault(one_line(Exception(reason), 100), []).append(recipe.stem.split("_")[0])
    if failed:
        good = len(own) - sum(len(numbers) for numbers in failed.values())
        sentence = "; ".join([f"{good} of {len(own)} run"] + [f"{', '.join(n)}: {reason}" for reason, n in failed.items()])
        raise UserError(sentence) if refused else Differs(sentence)


COLUMNS: dict[str, Callable[[Subject], float | None]] = {
    "load": load,
    "doctor": examine,
    "ask": ask,
    "int8": int8,
    "gptq4": gptq4,
    "prune": pruned,
    "drop_tokens": drop_tokens,
    "distill": distilled,
    "onnx": lambda s: exported(s, "onnx"),
    "openvino": lambda s: exported(s, "openvino"),
    "executorch": lambda s: exported(s, "executorch"),
    "batch": batch,
    "sizes": sizes,
    "multi_image": multi_image,
    "multi_turn": multi_turn,
    "recipes": recipes,
}


def _case(name: str) -> equality.Case:
    return next(c for c in equality.cases() if c.name == name)


def _same_inputs(model: nn.Module, case: equality.Case) -> None:
    """Our inputs are those that the library's own call makes of the same messages, and the model answers them."""
    models.chat(model, case.images or None, QUESTION)  # refuses what does not answer
    equality.source_answer(model, case)
    left = iter(case.images)
    filled = [
        {**turn, "content": [{**part, "image": next(left)} if part["type"] == "image" else part for part in turn["content"]]}
        for turn in case.messages
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    wanted, found = model.processor.apply_chat_template(filled, **options), equality.source_inputs(model, case)
    for key in set(wanted) & set(found) | {"input_ids"}:
        if wanted[key].shape != found[key].shape or not torch.equal(wanted[key].float(), found[key].float()):
            raise Differs(f"{case.name}: {key} are not what transformers makes")


def _all_of(steps: dict[str, Callable]) -> None:
    """Run all; UserError, or Differs where one is no refusal, that names those which do not work."""
    bad: dict[str, str] = {}
    refused = True
    for name, step in steps.items():
        try:
            step()
        except Exception as e:  # whatever a model of this family makes a technique raise
            bad[name] = _sentence(e)
            refused &= isinstance(e, UserError) and not isinstance(e, ParityError)
    if bad:
        good = ", ".join(n for n in steps if n not in bad)
        sentence = "; ".join(([f"{good}: yes"] if good else []) + [f"{name}: {why}" for name, why in bad.items()])
        if len(bad) == len(steps) and len(set(bad.values())) == 1:
            sentence = next(iter(bad.values()))
        raise UserError(sentence) if refused else Differs(sentence)


def _sentence(e: BaseException) -> str:
    named = isinstance(e, UserError | Differs)
    return one_line(e, 400) if named else f"{type(e).__name__}: {one_line(e, 160)}"


def cell(column: str, s: Subject) -> dict:
    """What came of one technique or runtime."""
    try:
        error = COLUMNS[column](s)
    except Exception as e:  # a cell never ends the run
        refused = isinstance(e, UserError | ImportError) and not isinstance(e, ParityError)
        sentence = re.sub(r"(/[\w.+-]+)+/", "", _sentence(e)).replace(s.folder.name, s.name)
        return {"result": "refused" if refused else "fails", "error": None, "sentence": sentence}
    return {"result": "works", "error": error, "sentence": None}


def versions() -> dict[str, str]:
    """Of what the cells depend on."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "onnxruntime", "openvino", "executorch")}


if __name__ == "__main__":
    name, columns, out = sys.argv[1:]
    subject, cells = Subject(name), {}
    for column in columns.split(","):
        cells[column] = cell(column, subject)
        Path(out).write_text(json.dumps(cells))
