"""The command line: `mmrecipes tour`, `doctor`, `compare`, `shrink`, `train`, `evaluate`, `serve`, `runs`."""

import json
import os
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer, echo

from mmrecipes import interrupt
from mmrecipes import track as tracking
from mmrecipes.errors import UserError, require, unsupported

Track = Annotated[bool, Option("--track", help="log it to the experiment record (as MMRECIPES_TRACK=1 does)")]
Model = Annotated[str, Argument(help="a house model, a local directory, or a hub id")]
app = Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _options(
    debug: Annotated[bool, Option("--debug", help="show the traceback of an error; anywhere in the line")] = False,
) -> None:
    pass


@app.command("tour")
def _tour(
    model: Annotated[str, Option(help="a house model, a local directory, or a hub id")] = "mini-vlm",
    images: Annotated[Path | None, Option(help="a folder of your own images")] = None,
    question: Annotated[str | None, Option(help="the question put to each of your images")] = None,
    out: Annotated[Path, Option(help="the page to write")] = Path("tour.html"),
    n: Annotated[int, Option(help="questions from the test split", min=1)] = 600,
) -> None:
    """Load a model, see where its time goes, compress it four ways, and read what that cost."""
    from mmrecipes.report import tour as report_tour

    report_tour.run(model, images, question, out, n)


@app.command("doctor")
def _doctor(
    model: Model = "mini-vlm",
    image: Annotated[Path | None, Option(help="an image of the size you use; default: a drawn scene, 512 px")] = None,
    question: Annotated[str, Option(help="the question of the prompt")] = "What is in this image?",
    config_only: Annotated[bool, Option("--config-only", help="from the JSON files alone, without weights")] = False,
    as_json: Annotated[bool, Option("--json", help="print one JSON object instead of text")] = False,
) -> None:
    """What will break or not pay off on this model and this machine, before you compress anything."""
    from mmrecipes.data import scenes
    from mmrecipes.models import loading, prompts
    from mmrecipes.report import config_only as report_config
    from mmrecipes.report import doctor as report_doctor

    if config_only:
        found, show = report_config.examine(model, question, image), report_config.show
    else:
        loaded = loading.load(model)
        shown = scenes.render(scenes.make_scene(1), 512) if image is None else image
        found, show = report_doctor.examine(loaded, prompts.chat(loaded, shown, question)), report_doctor.show
    if as_json:
        echo(json.dumps(found, default=vars))
    else:
        show(found)


@app.command("compare")
def _compare(
    a: Annotated[str, Argument(help="a checkpoint, an export, or a directory of optimum or transformers.js")],
    b: Annotated[str, Argument(help="another version of the same model")],
    images: Annotated[Path | None, Option(help="a folder of images; default: drawn scenes of several shapes")] = None,
    question: Annotated[str, Option(help="the question of each prompt")] = "What is in this picture?",
    n: Annotated[int, Option("-n", "--n", help="conversations to compare", min=1)] = 5,
    tolerance: Annotated[float, Option(help="relative difference that does not count", min=0)] = 1e-3,
    as_json: Annotated[bool, Option("--json", help="print one JSON object instead of text")] = False,
) -> None:
    """The first stage at which two versions of a model differ: preprocessing, vision encoder, connector, logits, answers.
    Exits with 1 where one differs by more than the tolerance."""
    from mmrecipes.report import stages

    asked = stages.conversations(images, n)
    found = stages.examine(stages.load_side(a), stages.load_side(b), asked, question, tolerance)
    if as_json:
        echo(json.dumps(found))
    else:
        stages.show(found)
    sys.exit(found["first"] is not None)


@app.command("shrink")
def _shrink(
    model: Model,
    out: Annotated[Path, Option(help="the directory to write: model, report.html, report.json, example.py")],
    budget: Annotated[str | None, Option(help="size of the weights: a fraction of float32, 0.25x, or 80MB")] = None,
    max_loss: Annotated[float | None, Option(help="points that may be lost; default: 1 of accuracy, 5 of agreement")] = None,
    runtime: Annotated[str, Option(help="onnx, openvino, executorch, torch; auto: onnx, vision where fastest")] = "onnx",
    calib: Annotated[Path | None, Option(help="a folder of images to calibrate on")] = None,
    images: Annotated[Path | None, Option(help="a folder of images to verify on, questions.jsonl optional")] = None,
    n: Annotated[int | None, Option("-n", "--n", help="questions to verify on; default: what 2 minutes allow", min=2)] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="print the plan and the predicted size, write nothing")] = False,
    track: Track = False,
) -> None:
    """Quantize your own model to a budget, verify it on your images, and write it with a report and code to run it."""
    _switch_on(track)
    from mmrecipes import shrink as shrinking

    shrinking.run(shrinking.Request(model, out, runtime, budget, max_loss, calib, images, n), dry_run)


@app.command("train")
def _train(
    name: Annotated[str, Argument(help="the house model to train: mini-vlm, mini-siglip, mini-cnn or mini-resampler")],
    out: Annotated[Path | None, Option(help="where the model goes; default: data/models/NAME")] = None,
    work: Annotated[Path | None, Option(help="checkpoints and log; run again to resume; default: runs/NAME")] = None,
    device: Annotated[str | None, Option(help="cpu or cuda; default: cuda where there is one")] = None,
    steps: Annotated[int, Option(help="optimizer steps of mini-cnn, batch 32", min=1)] = 900,
    track: Track = False,
) -> None:
    """Train a house model; mini-resampler goes on from mini-vlm. Interrupted, it resumes from its last checkpoint."""
    _switch_on(track)
    from mmrecipes.mini import cnn, resampler, siglip, vlm

    out, work = out or Path("data/models") / name, work or Path("runs") / name
    if name == "mini-vlm":
        wrote = vlm.train_mini_vlm(out, work, device=device)
    elif name == "mini-siglip":
        wrote = siglip.train_mini_siglip(out, work, device=device)
    elif name == "mini-cnn":
        wrote = cnn.train_mini_cnn(out, work, replace(cnn.CONFIG, steps=steps, device=device))
    elif name == "mini-resampler":
        wrote = resampler.train_mini_resampler(out, work, device=device)
    else:
        raise UserError(f"no house model {name!r} to train; expected mini-vlm, mini-siglip, mini-cnn or mini-resampler")
    echo(f"wrote {wrote}")


@app.command("evaluate")
def _evaluate(
    model: Model = "mini-vlm",
    n: Annotated[int | None, Option(help="questions (default: all), or scenes for a dual encoder (1000)", min=1)] = None,
    out: Annotated[Path | None, Option(help="a JSON file to write the result to")] = None,
    track: Track = False,
) -> None:
    """Accuracy of one model on the committed test split, per family, beside the majority floor; of a dual encoder, retrieval."""
    _switch_on(track)
    from mmrecipes.data import datasets
    from mmrecipes.evaluate import generation, retrieval
    from mmrecipes.measure import machine
    from mmrecipes.models import loading, saving

    loaded = loading.load(model)
    if hasattr(loaded, "logit_scale"):  # SigLIP, CLIP: it compares images with texts
        found = retrieval.retrieval_report(loaded, n or 1000)
        for what, share in found.items():
            echo(f"{what:30s} {share}")
    else:
        result = generation.vqa(loaded, datasets.test_split(n))
        for family, share in [*result.families.items(), ("overall", result.overall)]:
            echo(f"{family:10s} {share!s:36s} floor {100 * result.floors[family]:.1f}%")
        found = {"overall": result.overall, "families": result.families, "floors": result.floors}
    measured = {"environment": machine.environment(), "model": model, **found}
    if out:
        saving.write_json(out, measured)
    else:
        tracking.log_results(f"evaluate {Path(model).name}", measured)


@app.command("serve")
def _serve(
    folder: Annotated[Path, Argument(metavar="DIR", help="an export with batches: export.export(model, DIR, batches=True)")],
    host: Annotated[str, Option(help="the address to listen on; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, Option(help="0: any that is free; it is printed", min=0, max=65535)] = 8000,
    slots: Annotated[int, Option(help="answers that run together", min=1)] = 8,
    queue: Annotated[int, Option(help="requests that wait beside those; more get status 429", min=0)] = 32,
    seconds: Annotated[float, Option(help="the longest that a request may take", min=0.001)] = 120,
    max_tokens: Annotated[int, Option(help="the most tokens of an answer", min=1)] = 1024,
    max_prompt_tokens: Annotated[int | None, Option(help="the most tokens of a prompt; default: the model's", min=1)] = None,
    max_images: Annotated[int, Option(help="the most images of a request", min=0)] = 8,
    max_pixels: Annotated[int, Option(help="the most pixels of an image, told from its header", min=1)] = 16_000_000,
    max_bytes: Annotated[int, Option(help="the most bytes of a request's body", min=1)] = 20 * 2**20,
    prefix_bytes: Annotated[
        int, Option(help="of prompts kept for those that begin alike; 0 where clients must not learn what others asked", min=0)
    ] = 128 * 2**20,
    image_host: Annotated[list[str] | None, Option(help="a public host that images may be loaded from; may be repeated")] = None,
    api_key_env: Annotated[
        str | None, Option(help="the environment variable with the API key; default: none is asked for")
    ] = None,
    name: Annotated[str | None, Option(help="what the API calls the model; default: the directory's name")] = None,
    threads: Annotated[int | None, Option(help="of the runtime; default: all physical cores", min=1)] = None,
) -> None:
    """Answer OpenAI's chat API with an exported model, many requests together. SIGTERM lets running answers end."""
    require("fastapi", "uvicorn", "prometheus_client", extra="serve")
    from mmrecipes.serve import server, service

    key, hosts = server.api_key(api_key_env), tuple(h.lower() for h in image_host or ())
    sizes = {"body_bytes": max_bytes, "images": max_images, "pixels": max_pixels, "new_tokens": max_tokens}
    sizes |= {"prompt_tokens": max_prompt_tokens} if max_prompt_tokens else {}
    limits = service.Limits(slots, queue, seconds, image_hosts=hosts, prefix_bytes=prefix_bytes, **sizes)
    server.serve(service.Service(server.load(folder, threads), limits, name, key), host, port)


@app.command("runs")
def _runs(
    names: Annotated[list[str] | None, Argument(help="ids of runs to compare, or their beginnings; default: all")] = None,
    plot: Annotated[Path | None, Option(help="a PNG to write: accuracy against size or time, with the Pareto front")] = None,
    against: Annotated[str, Option(help="what the plot and the front compare accuracy with: mb or ms")] = "mb",
) -> None:
    """What the experiment record holds: runs, their settings that differ, and what they measured."""
    from mmrecipes.report import runs

    runs.show(runs.read(names or []), against, plot)


def _switch_on(track: bool) -> None:
    if track:
        os.environ[tracking.VARIABLE] = "1"
        tracking.storage()  # whether it is installed is said now, not after an hour


def _tried() -> tuple[str, str]:
    """The model and the command of this command line, to name them."""
    command, *rest = [each for each in sys.argv[1:] if not each.startswith("-")]
    models = [each for each in rest if (Path(each).expanduser() / "config.json").is_file()]
    kinds = [json.loads((Path(each).expanduser() / "config.json").read_text()).get("model_type") for each in models]
    return (kinds or ["this model"])[0], command


def main() -> None:
    """Run the command line: errors are one line, and exit with 1; with --debug, after their traceback."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [each for each in sys.argv if each != "--debug"]
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the place in the code
    if not sys.stderr.isatty():  # a "0" would not do: other modules ask only whether it is set
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with interrupt.ends_the_process():
            app()
    except Exception as e:
        if debug:
            traceback.print_exc()
        known = isinstance(e, UserError | ImportError)  # the second names the package that is missing
        echo(f"error: {e if known else unsupported(*_tried(), e)}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
