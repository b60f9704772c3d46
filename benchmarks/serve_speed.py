"""What serving many users at once gains: the dimensions of SmolVLM-256M with random weights, `python benchmarks/serve_speed.py`.

`mmrecipes serve` on ONNX Runtime and OpenVINO, and on the same checkpoint `transformers serve` (PyTorch) and llama.cpp's server,
where `make llama` has built it: REQUESTS requests, one after the other and USERS at once, by their text stream. Each asks
something else about an image of 512 px and gets NEW tokens, the end of sequence ignored. "new images": every request has another
one; "one image": all have the same, and what a server keeps of it (visual tokens, the KV cache of the prompt's beginning), it
keeps. ROUNDS rounds, the servers in turn, each started anew; transformers, slow and keeping nothing, has one and the first case
alone. llama.cpp shows an image twice, as an overview and as a tile. Of each: requests and tokens a second, time to the first
token and between tokens (the gaps of all requests), peak memory. Writes results/serve-speed.json after each server. A quarter
of an hour a round; servers by name as arguments: those are measured, and others' rows stay if the machine and the packages do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from mmrecipes import data, export, measure, models
from mmrecipes.data import scenes
from mmrecipes.measure.process import peak_mb, same_packages
from mmrecipes.mini import model as mini_model
from serve import CHAT, png, request

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "serve-speed"
REQUESTS, USERS, NEW = 16, 8, 64
ROUNDS = int(os.environ.get("ROUNDS", 2))
ASKED = ("what colour it has", "how large it is", "where it is", "which shape it has")  # in another order in each request
OURS = {"ONNX Runtime fp32": ("onnx", "fp32"), "ONNX Runtime int8": ("onnx", "int8"), "ONNX Runtime int4": ("onnx", "int4")}
OURS |= {"OpenVINO int8": ("openvino", "int8")}
LLAMA = {"llama.cpp server Q8_0": "q8_0", "llama.cpp server Q4_0": "q4_0"}
LLAMA_PYTHON, LLAMA_SERVER = (ROOT / ".venv-peers" / "bin" / name for name in ("python", "llama-server"))
PEERS = {"transformers serve, PyTorch fp32": "float32", "transformers serve, PyTorch bf16": "bfloat16"}


def checkpoint():  # -> PreTrainedModel
    """Random weights that speak: what is no word by itself gets a logit of 0, and so never the largest one."""
    model = mini_model.real_size()
    decode = model.processor.tokenizer.decode
    silent = [i for i in range(model.lm_head.out_features) if not decode([i]).strip().isalpha()]
    model.lm_head.weight.data[silent] = 0
    return model


def folder(name: str) -> Path:
    """What the server loads: an export, made once, or the checkpoint."""
    place = WORK / re.sub(r"\W+", "-", name if name not in PEERS else "checkpoint").lower()
    if not place.exists():
        print(f"making {place.name}", flush=True)
        if name in PEERS:
            models.save(model := checkpoint(), model.processor, place)
        elif name in LLAMA:
            code = "import sys, pathlib as p, gguf_files as g; g.write(p.Path(sys.argv[1]), p.Path(sys.argv[2]), sys.argv[3])"
            source, bench = folder(next(iter(PEERS))), Path(__file__).parent
            aside = place.with_suffix(".part")  # whoever finds `place` has whole files
            shutil.rmtree(aside, ignore_errors=True)
            subprocess.run([str(LLAMA_PYTHON), "-c", code, str(source), str(aside), LLAMA[name]], cwd=bench, check=True)
            aside.rename(place)
        else:
            export.export(checkpoint(), place, *OURS[name], batches=True)
    return place


@contextlib.contextmanager
def server(name: str) -> Iterator[tuple[str, subprocess.Popen, dict[str, Any]]]:
    """Its address, its process, and what its requests hold besides."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if name in PEERS:
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder(name)), "--port", str(port)]
        command += ["--dtype", PEERS[name], "--device", "cpu", "--host", "127.0.0.1"]
        plain = json.dumps({"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False})
        more = {"model": str(folder(name)), "generation_config": plain}
    elif name in LLAMA:
        template = folder(next(iter(PEERS))) / "chat_template.jinja"
        command = [str(LLAMA_SERVER), "-m", str(folder(name) / "model.gguf"), "--mmproj", str(folder(name) / "vision.gguf")]
        command += ["--jinja", "--chat-template-file", str(template), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--parallel", str(USERS), "--ctx-size", str(512 * USERS), "--threads", str(measure.environment()["threads"])]
        more = {"model": "m", "max_tokens": NEW, "ignore_eos": True, "temperature": 0}
    else:
        command = [sys.executable, "-m", "mmrecipes.cli", "serve", str(folder(name)), "--port", str(port), "--name", "m"]
        more = {"model": "m", "max_tokens": NEW, "ignore_eos": True}
    env = same_packages() | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{address}/health").status_code == 200:
                        break
                time.sleep(0.2)
            yield address, process, more
        finally:
            process.kill()


def question(i: int) -> str:
    """As long as the others; they share its first words, and some of them the next ones."""
    order = list(itertools.permutations(ASKED))[i]
    return f"Say of each object in this picture {order[0]}, {order[1]}, {order[2]} and {order[3]}."


async def one(client: httpx.AsyncClient, image: bytes, text: str, more: dict[str, Any]) -> list[float]:
    """When each piece of text of an answer came, seconds since it was asked for."""
    begun, came = time.perf_counter(), []
    asked = {k: v for k, v in request(image, text, stream=True).items() if k != "max_tokens"} | more
    async with client.stream("POST", CHAT, json=asked) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{reply.status_code}: {(await reply.aread()).decode()[:400]}")
        async for line in reply.aiter_lines():
            if line.startswith("data: {") and (choices := json.loads(line[6:]).get("choices")):
                came += [time.perf_counter() - begun] if choices[0]["delta"].get("content") else []
    return came


async def load(address: str, together: int, images: list[bytes], more: dict[str, Any]) -> dict[str, Any]:
    """REQUESTS requests, `together` of them at a time."""
    limit, begun = asyncio.Semaphore(together), time.perf_counter()
    # a connection a request: llama.cpp's server closes those that rest for five seconds
    one_each = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=one_each) as client:

        async def waits(i: int, image: bytes) -> tuple[list[float], float]:
            async with limit:
                return await one(client, image, question(i), more), time.perf_counter()

        found = await asyncio.gather(*(waits(i, image) for i, image in enumerate(images)))
    seconds = max(end for _, end in found) - begun
    return {"seconds": seconds, "came": [came for came, _ in found]}


def row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rounds of one cell say together."""
    came = [each for run in runs for each in run["came"] if each]
    gaps = np.concatenate([np.diff(each) for each in came])
    first = [each[0] for each in came]
    rates = [REQUESTS / run["seconds"] for run in runs]
    found = {"requests_per_s": float(np.median(rates)), "low": min(rates), "high": max(rates)}
    found |= {"tokens_per_s": NEW * found["requests_per_s"], "n": len(came), "pieces": float(np.mean([*map(len, came)]))}
    return found | {
        "first_ms": dict(zip(("p50", "p95"), 1e3 * np.percentile(first, [50, 95]), strict=True)),
        "gap_ms": dict(zip(("p50", "p95"), 1e3 * np.percentile(gaps, [50, 95]), strict=True)),
    }


def pictures(offset: int, same: bool) -> list[bytes]:
    numbers = [data.SPLITS["validation"][6000 + offset + (0 if same else i)] for i in range(REQUESTS)]
    return [png(scenes.render(scenes.make_scene(n)).resize((512, 512))) for n in numbers]


def serve_round(name: str, r: int) -> dict[str, Any]:
    """One start of a server, all cells."""
    with server(name) as (address, process, more):
        warm = pictures(900, same=True)[:2]
        asyncio.run(load(address, 1, warm, more))
        found: dict[str, Any] = {}
        for case, same in (("new images", False), ("one image", True))[: 1 if name in PEERS else 2]:
            for together in (1, USERS):
                images = pictures(100 * r + 20 * together, same)
                found[f"{case}, {together}"] = asyncio.run(load(address, together, images, more))
        return {"cells": found, "peak_mb": peak_mb(process.pid), "measured": when(measure.environment())}


def when(environment: dict[str, Any]) -> dict[str, str]:
    return {key: environment[key] for key in ("date", "commit")}


def save(rounds: dict[str, list[dict[str, Any]]]) -> None:
    rows, environment = [], measure.environment()
    for name, told in rounds.items():
        cells = {cell: row([one["cells"][cell] for one in told]) for cell in told[0]["cells"]}
        found = {"rounds": len(told), "measured": told[-1]["measured"], "peak_mb": max(one["peak_mb"] for one in told)}
        rows.append({"server": name} | found | {"cells": cells})
        print(name, round(rows[-1]["peak_mb"]), {cell: round(each["requests_per_s"], 2) for cell, each in cells.items()})
    knobs = {
        "requests": REQUESTS,
        "users": USERS,
        "new_tokens": NEW,
        "image": "512 px",
        "model": "smolvlm-256m",
    }
    content, path = {"environment": environment, "knobs": knobs}, ROOT / "results" / "serve-speed.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("knobs") == knobs and before["environment"] | when(environment) == environment:
        rows += [row for row in before["rows"] if row["server"] not in rounds]
    rows.sort(key=lambda row: [*OURS, *LLAMA, *PEERS].index(row["server"]))
    models.saving.write_json(path, content | {"rows": rows})


def main(only: list[str]) -> None:
    there = (*OURS, *(LLAMA if LLAMA_SERVER.exists() else ()), *PEERS)
    if unknown := set(only) - set(there):
        raise SystemExit(
            f"serve_speed: no server {', '.join(sorted(unknown))}; there are {', '.join(there)} (llama.cpp's after `make llama`)"
        )
    names = [n for n in there if not only or n in only]
    for name in names:
        folder(name)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for r in range(ROUNDS):
        for name in names:
            if r and name in PEERS:
                continue
            begun = time.perf_counter()
            rounds[name].append(serve_round(name, r))
            print(f"round {r}: {name}, {time.perf_counter() - begun:.0f} s", flush=True)
            save({name: told for name, told in rounds.items() if told})


if __name__ == "__main__":
    main(sys.argv[1:])
