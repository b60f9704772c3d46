"""The command line: `mmrecipes tour`, `mmrecipes doctor`, `mmrecipes shrink`, `mmrecipes train`, `mmrecipes evaluate`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mmrecipes.errors import UserError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Make multimodal models small and fast, and measure what that costs."""


@app.command("tour")
def _tour(
    model: Annotated[str, typer.Option(help="a house model, a local directory, or a hub id")] = "mini-vlm",
    images: Annotated[Path | None, typer.Option(help="a folder of your own images")] = None,
    question: Annotated[str | None, typer.Option(help="the question put to each of your images")] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("tour.html"),
    n: Annotated[int, typer.Option(help="questions from the test split", min=1)] = 600,
) -> None:
    """Load a model, see where its time goes, compress it four ways, and read what that cost."""
    from mmrecipes.report import tour as report_tour

    report_tour.run(model, images, question, out, n)


@app.command("doctor")
def _doctor(
    model: Annotated[str, typer.Argument(help="a house model, a local directory, or a hub id")] = "mini-vlm",
    image: Annotated[Path | None, typer.Option(help="an image of the size you use; default: a drawn scene, 512 px")] = None,
) -> None:
    """What will break or not pay off on this model and this machine, before you compress anything."""
    from mmrecipes.data import scenes
    from mmrecipes.models import loading, prompts
    from mmrecipes.report import doctor as report_doctor

    loaded = loading.load(model)
    shown = scenes.render(scenes.make_scene(1), 512) if image is None else image
    report_doctor.show(report_doctor.examine(loaded, prompts.chat(loaded, shown, "What is in this image?")))


@app.command("shrink")
def _shrink(
    model: Annotated[str, typer.Argument(help="a house model, a local directory, or a hub id")],
    out: Annotated[Path, typer.Option(help="the directory to write: model, report.html, report.json, example.py")],
    budget: Annotated[str | None, typer.Option(help="size of the weights: a fraction of float32, 0.25x, or 80MB")] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="points that may be lost; default: 1 of accuracy, or without labels 5 of token agreement")
    ] = None,
    runtime: Annotated[str, typer.Option(help="onnx, openvino, executorch or torch")] = "onnx",
    calib: Annotated[Path | None, typer.Option(help="a folder of images to calibrate on")] = None,
    images: Annotated[Path | None, typer.Option(help="a folder of images to verify on, questions.jsonl optional")] = None,
    n: Annotated[
        int | None, typer.Option("-n", "--n", help="questions to verify on; default: what 2 minutes allow", min=2)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and the predicted size, write nothing")] = False,
) -> None:
    """Quantize your own model to a budget, verify it on your images, and write it with a report and code to run it."""
    from mmrecipes import shrink as shrinking

    shrinking.run(shrinking.Request(model, out, runtime, budget, max_loss, calib, images, n), dry_run)


@app.command("train")
def _train(
    name: Annotated[str, typer.Argument(help="the house model to train: mini-vlm, mini-siglip or mini-cnn")],
    out: Annotated[Path | None, typer.Option(help="where the model goes; default: data/models/NAME")] = None,
    work: Annotated[Path | None, typer.Option(help="checkpoints and log; run again to resume; default: runs/NAME")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of mini-cnn, batch 32", min=1)] = 900,
) -> None:
    """Train a house model from nothing. Interrupted, it resumes from its last checkpoint."""
    out, work = out or Path("data/models") / name, work or Path("runs") / name
    if name == "mini-vlm":
        from mmrecipes.mini.vlm import train_mini_vlm

        typer.echo(f"wrote {train_mini_vlm(out, work, device=device)}")
    elif name == "mini-siglip":
        from mmrecipes.mini.siglip import train_mini_siglip

        typer.echo(f"wrote {train_mini_siglip(out, work, device=device)}")
    elif name == "mini-cnn":
        from mmrecipes.mini.cnn import CONFIG, train_mini_cnn

        typer.echo(f"wrote {train_mini_cnn(out, work, replace(CONFIG, steps=steps, device=device))}")
    else:
        raise UserError(f"no house model {name!r} to train; expected mini-vlm, mini-siglip or mini-cnn")


@app.command("evaluate")
def _evaluate(
    model: Annotated[str, typer.Argument(help="a house model, a local directory, or a hub id")] = "mini-vlm",
    n: Annotated[int | None, typer.Option(help="questions (default: all), or scenes for a dual encoder (1000)", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="a JSON file to write the result to")] = None,
) -> None:
    """Accuracy of one model on the committed test split, per family, beside the majority floor; of a dual encoder, retrieval."""
    from mmrecipes.data import datasets
    from mmrecipes.evaluate import generation, retrieval
    from mmrecipes.measure import machine
    from mmrecipes.models import loading, saving

    loaded = loading.load(model)
    if hasattr(loaded, "logit_scale"):  # SigLIP, CLIP: it compares images with texts
        found = retrieval.retrieval_report(loaded, n or 1000)
        for what, share in found.items():
            typer.echo(f"{what:30s} {share}")
        if out:
            saving.write_json(out, {"environment": machine.environment(), "model": model, **found})
        return
    rows = datasets.test_split(n)
    result = generation.vqa(loaded, rows)
    for family, share in [*result.families.items(), ("overall", result.overall)]:
        typer.echo(f"{family:10s} {share!s:36s} floor {100 * result.floors[family]:.1f}%")
    if out:
        content = {"model": model, "overall": result.overall, "families": result.families, "floors": result.floors}
        saving.write_json(out, {"environment": machine.environment(), **content})


def main() -> None:
    """Run the command line: errors a user can act on are one line, and exit with 1."""
    if not sys.stderr.isatty():  # a "0" would not do: other modules ask only whether it is set
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except UserError as e:
        typer.echo(f"error: {e}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
