"""Fewer visual tokens: what each way costs in accuracy and gives in time. `accuracy()` and `speed()` fill results/tokens*.json.

- accuracy: `mini-vlm` on the committed test split, each variant paired with all tokens on the same questions; about 25 minutes
  on two cores, of which 6 train a larger pixel shuffle. Goes on where it was stopped: what is done lies in runs/tokens.
- speed: the real-size SmolVLM-256M twin (random weights) on a picture of four tiles and their overview: language prefill and time
  to first token, interleaved, beside what the FLOP count promised, and the peak of a fresh process; about 8 minutes.

Each returns a dict that JSON can hold. `python benchmarks/visual_tokens.py accuracy` prints one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn

from mmrecipes import data, evaluate, measure, models
from mmrecipes.data import families as data_families
from mmrecipes.data import scenes
from mmrecipes.mini import model as mini_model
from mmrecipes.prune import token_dropping, token_merging

WORK = Path(__file__).resolve().parent.parent / "runs" / "tokens"
SECONDS = 360  # of training for the larger pixel shuffle
WIDE = ("left of", "right of", "above", "below", "closest")  # words of questions about more than one object
QUESTION = "What colour is the large circle in this picture?"


def budget(question: str) -> float:
    """The share of visual tokens that a question gets: counting looks at the whole picture, a relation at more than one place."""
    return 1.0 if question.startswith("How many") else 0.5 if any(w in question for w in WIDE) else 0.25


def counting(question: str) -> float:
    """A quarter, but all to count: what the question's own attention needs after two layers."""
    return 1.0 if question.startswith("How many") else 0.25


# name -> options of prune.token_dropping.prefill
DROPPED = {
    f"{how}, layer {layer}, keep {keep:.0%}": {"how": how, "layer": layer, "keep": keep}
    for layer, hows, shares in (
        (0, ("uniform", "random", "distinct", "words"), (0.5, 0.25)),
        (1, ("random", "attention", "question"), (0.5,)),
        (2, ("uniform", "random", "attention", "question", "words"), (0.5, 0.25)),
        (2, ("uniform", "question"), (0.1,)),
    )
    for how in hows
    for keep in shares
}
MERGED = {
    **{f"merge {share:.0%} in the tower": {"keep": 1.0, "merge": share} for share in (0.25, 0.5, 0.75)},
    "merge 50%, then question, layer 2, 50%": {"how": "question", "layer": 2, "keep": 0.5, "merge": 0.5},
}


# ---- accuracy


def accuracy(n: int | None = None, seconds: float = SECONDS, work: Path = WORK) -> dict:
    """Accuracy of each way of dropping and merging, with its paired change and that of each family; None: the whole split.

    Each row says which commit computed it: a new row can be added to kept ones. After a change of code or model remove `work`.
    """
    rows, model = data.test_split(n), models.load("mini-vlm")
    commit, families, base = measure.environment()["commit"], rows["family"][:], []
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "rows.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    if done.get("n") != len(rows) or "commits" not in done:  # other questions, or kept by an older job
        done = {"n": len(rows), "right": {}, "commits": {}}
        (work / "coarse.pt").unlink(missing_ok=True)
    found: dict[str, dict] = {}

    def record(name: str, run: Callable[[], list[str]], **about) -> None:
        if name not in done["right"]:
            done["right"][name] = evaluate.score(run(), rows["answer"][:], families, {}).right
            done["commits"][name] = commit
            models.write_json(kept, done)
        right = done["right"][name]
        base[:] = base or right
        per = {f: [i for i, g in enumerate(families) if g == f] for f in sorted(set(families))}
        found[name] = {
            **{"accuracy": evaluate.wilson(sum(right), len(right)), "change": evaluate.paired(base, right)},
            "commit": done["commits"][name],
            **{"families": {f: evaluate.paired([base[i] for i in at], [right[i] for i in at]) for f, at in per.items()}, **about},
        }
        print(f"{name:52s} {found[name]['accuracy']}  {found[name]['change']}", flush=True)

    prepared: list[tuple] = []  # (which questions, embeddings, where the picture is): the tower runs once for all

    def dropped(keep: float | Callable[[str], float], **options) -> list[str]:
        said = [""] * len(rows)
        if not prepared:
            for at, inputs in token_dropping.prompts(
                model, rows["image"][:], rows["question"][:], [budget(q) for q in rows["question"]]
            ):
                with torch.inference_mode():
                    prepared.append((at, *token_dropping.embed(model, inputs)))
        for at, x, visual in prepared:
            share = keep(rows[at[0]]["question"]) if callable(keep) else keep
            ids = token_dropping.decode(model, token_dropping.read(model, x, visual, share, **options))
            for i, text in zip(at, model.processor.batch_decode(ids, skip_special_tokens=True), strict=True):
                said[i] = text.strip()
        return said

    record("all tokens", partial(dropped, 1.0))
    first = rows.select(range(min(140, len(rows))))
    assert evaluate.vqa(model, first, progress=False).right == base[: len(first)], "keeping all is not what generate() says"
    for name, options in DROPPED.items():
        record(name, partial(dropped, **options), **options)
    for name, share, options in (
        ("words, layer 0, a budget by question", budget, {"how": "words", "layer": 0}),
        ("question, layer 2, a quarter, but all to count", counting, {"how": "question", "layer": 2}),
    ):
        mean = sum(map(share, rows["question"])) / len(rows)
        record(name, partial(dropped, share, **options), keep=mean, **options)
    for name, options in MERGED.items():
        record(name, partial(token_dropping.answers, model, rows["image"][:], rows["question"][:], **options), **options)
    coarse = token_merging.coarser(model)
    ask = partial(token_dropping.answers, images=rows["image"][:], questions=rows["question"][:], keep=1.0)
    record("pixel shuffle 2, untrained", partial(ask, coarse), keep=0.25)
    about = train(coarse, seconds, work) if "pixel shuffle 2, trained" not in done["right"] else done.get("training", {})
    done["training"] = about
    record("pixel shuffle 2, trained", partial(ask, coarse), keep=0.25, **about)
    whole = {f: [r for r, g in zip(base, families, strict=True) if g == f] for f in sorted(set(families))}
    floors = {f: asdict(evaluate.wilson(sum(r), len(r))) for f, r in whole.items()}
    return {"model": "mini-vlm, trained weights", "n": len(rows), "families": floors, "variants": found}


def train(model: nn.Module, seconds: float, work: Path, batch: int = 64) -> dict:
    """Train connector and language model on training questions, the tower frozen, for `seconds`; in place. Says what it did.

    Its weights go to `work`, so that a stopped job does not train twice.
    """
    file = work / "coarse.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        return state["about"]
    torch.manual_seed(0)
    model.model.vision_model.requires_grad_(False)
    taught = [p for p in model.parameters() if p.requires_grad]
    stepper = torch.optim.AdamW(taught, lr=5e-4, weight_decay=0.01)
    start, steps, rows = time.perf_counter(), 0, None
    while (spent := time.perf_counter() - start) < seconds:
        if steps % 8 == 0:  # the next questions, from scenes not used before
            rows = _questions(steps // 8, 8 * batch)
        part = rows.select(range(batch * (steps % 8), batch * (steps % 8 + 1)))
        for group in stepper.param_groups:
            group["lr"] = 5e-4 * min(1, steps / 20, 1.05 - spent / seconds)
        ((inputs, lengths),) = models.teacher_forced(model, part, batch)
        logits = model(**inputs, logits_to_keep=max(lengths) + 1).logits
        loss = sum(
            nn.functional.cross_entropy(logits[i, -k - 1 : -1], inputs["input_ids"][i, -k:]) for i, k in enumerate(lengths)
        ) / len(lengths)
        loss.backward()
        nn.utils.clip_grad_norm_(taught, 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        if steps % 50 == 0:
            print(f"step {steps} {spent:.0f} s loss {loss.item():.3f}", flush=True)
        steps += 1
    about = {"seconds": seconds, "steps": steps, "questions": steps * batch}
    torch.save({"model": model.state_dict(), "about": about}, file)
    return about


def _questions(part: int, n: int) -> Dataset:
    """`n` training questions, of every family, from scenes of their own for each `part`."""
    asked = []
    for seed in range(part * 4 * n, (part + 1) * 4 * n):
        scene = scenes.make_scene(data.SPLITS["train"][seed])
        found = [q for f in data_families.FAMILIES if (q := data_families.ask(scene, f))]
        if len(asked) < n:
            asked.append((scene, found[seed % len(found)]))
    return Dataset.from_dict(
        {
            "image": [scenes.render(s, 128) for s, _ in asked],
            "question": [q.text for _, q in asked],
            "answer": [q.answer for _, q in asked],
        }
    ).with_format(None)


# ---- speed


def twin() -> tuple[nn.Module, dict]:
    """The real-size twin and a picture of 1,024 px: four tiles of 512 px and their overview, 320 visual tokens."""
    model = mini_model.real_size("smolvlm-256m")
    model.processor.image_processor.size = {"longest_edge": 1024}
    picture = scenes.render(scenes.make_scene(1), 1024)
    return model, dict(models.chat(model, picture, QUESTION))


def flop(run: Callable) -> float:
    """Of one call, two a multiply-add. torch's counter, told of the CPU's attention kernel."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}) as counter:
        run()
    return counter.get_total_flops()


def speed(repeats: int = 7, peaks: bool = True) -> dict:
    """Milliseconds against tokens kept, and what the FLOP count promised, on the twin; peaks of fresh processes."""
    model, inputs = twin()
    found: dict[str, dict] = {}
    with torch.inference_mode():
        x, visual = token_dropping.embed(model, inputs)
    runs = {"keep 100%": partial(token_dropping.read, model, x, visual, 1.0)}
    dropped = (("attention", 2, (0.75, 0.5, 0.25, 0.1)), ("question", 2, (0.25,)), ("words", 0, (0.5, 0.25)))
    for how, layer, shares in (*dropped, ("attention", 15, (0.25,))):  # 15 of 30: the depth at which mini-vlm was asked, 2 of 4
        for keep in shares:
            name = f"keep {keep:.0%}, {how}, layer {layer}"
            runs[name] = partial(token_dropping.read, model, x, visual, keep=keep, layer=layer, how=how)
    found["prefill"] = _timed(runs, repeats)
    for name, run in runs.items():
        cache = run().cache
        found["prefill"][name]["cache_mb"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1e6
        del cache
    first = partial(token_dropping.prefill, model, inputs)
    runs = {"nothing merged or dropped": partial(first, keep=1.0)}
    runs |= {f"merge {m:.0%}": partial(first, keep=1.0, merge=m) for m in (0.25, 0.5, 0.75)}
    runs["keep 25%"] = partial(first, keep=0.25)
    runs["merge 50%, keep 25%"] = partial(first, keep=0.25, merge=0.5)
    found["ttft"] = _timed(runs, max(3, repeats // 2))
    for stage, rows in found.items():
        for name, row in rows.items():
            print(
                f"{stage:8s} {name:34s} {row['ms']['median']:.0f} ms, {row['faster']:.2f}x, FLOP {row['promised']:.2f}x",
                flush=True,
            )
    del model, x, visual, runs, first
    if peaks:
        found["peak_mb"] = {name: _peak(keep, merge) for name, (keep, merge) in PEAKS.items()}
    about = "smolvlm-256m twin, random weights, fp32, a picture of 1,024 px in four tiles and an overview, batch 1"
    counts = {"visual_tokens": int((inputs["input_ids"] == 3).sum()), "tokens": inputs["input_ids"].shape[1]}
    return {"model": about, **counts, **found}


PEAKS = {"all tokens": (1.0, 0.0), "keep 25%": (0.25, 0.0), "merge 50%": (1.0, 0.5)}


def _timed(runs: dict[str, Callable], repeats: int) -> dict[str, dict]:
    """Milliseconds, interleaved, and how many times faster than the first: measured, and by FLOP. Logits must be finite."""
    work = {}
    for name, run in runs.items():
        assert torch.isfinite(run().logits).all(), name
        work[name] = flop(run)
    times, first = measure.wall(runs, repeats, warmup=1), next(iter(runs))
    return {
        name: {
            "ms": times[name],
            "gflop": work[name] / 1e9,
            "faster": times[first]["median"] / times[name]["median"],
            "promised": work[first] / work[name],
        }
        for name in runs
    }


def _peak(keep: float, merge: float) -> float:
    """Most MB of a fresh process that builds the twin and reads one prompt."""
    done = subprocess.run([sys.executable, __file__, "peak", str(keep), str(merge)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        vlm, prompt = twin()
        token_dropping.prefill(vlm, prompt, keep=float(sys.argv[2]), merge=float(sys.argv[3]))
        print(measure.peak_mb())
    else:
        jobs = {"accuracy": accuracy, "speed": speed}
        for job in sys.argv[1:] or jobs:
            print(json.dumps({job: jobs[job]()}, indent=1, default=vars))
