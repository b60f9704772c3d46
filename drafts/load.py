"""`mini-vlm` behind `mmrecipes serve`, asked by clients that behave and by clients that do not: `make load`, some minutes.

- "speed": the same long answers one by one, and by USERS clients at once, in turn for ROUNDS rounds; and short answers, which are
  little more than a prefill each, so that a batch can gain little. Long ones are drawn at a high temperature, by a seed.
- "clients": CLIENTS of the KINDS below in Poisson arrival. By kind the statuses; of those that behave the answers that are not
  the exported model's own, accepted requests without a whole answer, and latency; the most requests admitted at any moment.
- "stop": SIGTERM while USERS answers run: how many were whole, what a new request gets, the exit code.
Writes results/serve.json.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from mmrecipes import data, export, inference, measure, models
from mmrecipes.data import families, scenes
from mmrecipes.interrupt import temporary_directory
from mmrecipes.measure.process import same_packages

PATH = Path(__file__).resolve().parent.parent / "results" / "serve.json"
CLIENTS, USERS, ROUNDS, QUESTIONS = 200, 8, 3, 16
SLOTS, QUEUE, MAX_BYTES, RATE = 8, 24, 1_000_000, 20.0  # RATE: clients a second
LONG = {"temperature": 4.0, "max_tokens": 64}
KINDS = ("asks",) * 6 + ("streams",) * 4 + ("reads slowly",) * 3 + ("vanishes", "too large", "broken base64", "bomb")
KINDS += ("wrong JSON", "too long", "10,000 headers", "tools")
CHAT = "/v1/chat/completions"


def ask(i: int) -> tuple[Image.Image, str]:
    """The image and the question number i."""
    scene, start = scenes.make_scene(data.SPLITS["validation"][5000 + i]), i % len(families.FAMILIES)
    order = [*families.FAMILIES[start:], *families.FAMILIES[:start]]
    return scenes.render(scene), next(q.text for q in (families.ask(scene, f, scene.seed) for f in order) if q)


def request(image: bytes, text: str, **options) -> dict:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": "mini", "messages": [{"role": "user", "content": content}], "max_tokens": 16, **options}


def png(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def body(kind: str, i: int, bomb: bytes) -> bytes:
    """What a client of this kind sends."""
    asked = request(*QUERIES[i % QUESTIONS], stream=kind in ("streams", "reads slowly", "vanishes"))
    if kind == "vanishes":
        asked |= LONG | {"seed": i}
    if kind == "tools":
        asked["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    if kind == "too long":
        asked["messages"][0]["content"][1]["text"] = "what is there " * 4000
    if kind == "bomb":
        asked = request(bomb, "What is there?")
    if kind == "broken base64":
        asked["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,@@@@"
    sent = json.dumps(asked).encode()
    return sent[:-9] if kind == "wrong JSON" else sent + b" " * MAX_BYTES if kind == "too large" else sent


async def behave(client: httpx.AsyncClient, kind: str, i: int, bomb: bytes) -> dict:
    """One client: {"kind", "status", "text" (None where the answer is not whole), "ms"}."""
    headers = {"Content-Type": "application/json"}
    if kind == "10,000 headers":
        headers |= {f"X-{n}": "1" for n in range(10_000)}
    begun, text = time.perf_counter(), None
    try:
        async with client.stream("POST", CHAT, content=body(kind, i, bomb), headers=headers) as reply:
            status = reply.status_code
            if status == 200 and kind in ("streams", "reads slowly", "vanishes"):
                text = await read_stream(reply, kind)
            else:
                found = json.loads(await reply.aread()) if status == 200 else {}
                text = found["choices"][0]["message"]["content"] if found else None
    except (httpx.HTTPError, ValueError) as e:
        status = type(e).__name__
    return {"kind": kind, "i": i, "status": status, "text": text, "ms": 1e3 * (time.perf_counter() - begun)}


async def read_stream(reply: httpx.Response, kind: str) -> str | None:
    """The text of a stream that ends in [DONE]; None for others, and for a client that leaves after the first piece."""
    text = ""
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            return text
        if line.startswith("data: "):
            piece = json.loads(line[6:])
            text += (piece["choices"][0]["delta"].get("content") or "") if piece.get("choices") else ""
            if kind == "vanishes" and text:
                return None
            await asyncio.sleep(0.1 if kind == "reads slowly" else 0)
    return None


async def crowd(client: httpx.AsyncClient, bomb: bytes) -> tuple[list[dict], int]:
    """What each of the clients got, and the most requests that the server had admitted when it was asked."""
    rng, running, admitted, done = random.Random(0), [], [0], asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            lines = (await client.get("/metrics")).text.splitlines()
            admitted.append(int(float(next(x.split()[1] for x in lines if x.startswith("mmrecipes_requests_admitted ")))))
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    for i in range(CLIENTS):
        running.append(asyncio.create_task(behave(client, rng.choice(KINDS), i, bomb)))
        await asyncio.sleep(rng.expovariate(RATE))
    found = [await each for each in running]
    done.set()
    await watching
    return found, max(admitted)


async def speed(client: httpx.AsyncClient, options: dict) -> dict[str, list[float]]:
    """Requests a second, one by one and USERS at once, of each round."""
    rates: dict[str, list[float]] = {"one by one": [], f"{USERS} at once": []}
    for r in range(ROUNDS):
        for name, together in zip(rates, (1, USERS), strict=True):
            limit, begun = asyncio.Semaphore(together), time.perf_counter()

            async def one(i: int, limit=limit, r=r) -> None:
                async with limit:
                    reply = await client.post(CHAT, json=request(*QUERIES[i], seed=100 * r + i, **options))
                    reply.raise_for_status()

            await asyncio.gather(*map(one, range(QUESTIONS)))
            rates[name].append(QUESTIONS / (time.perf_counter() - begun))
    return rates


async def stop(client: httpx.AsyncClient, server: subprocess.Popen) -> dict:
    """SIGTERM once USERS streams have begun."""
    begun = asyncio.Barrier(USERS + 1)

    async def one(i: int) -> bool:
        asked = request(*QUERIES[i], stream=True, seed=i, **LONG)
        async with client.stream("POST", CHAT, json=asked) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            await begun.wait()
            return "data: [DONE]" in [line async for line in lines]

    running = [asyncio.create_task(one(i)) for i in range(USERS)]
    await begun.wait()
    server.send_signal(signal.SIGTERM)
    late = await behave(client, "asks", 0, b"")
    whole = sum([await each for each in running])
    return {"running": USERS, "whole": whole, "a new request": late["status"], "exit code": await asyncio.to_thread(server.wait)}


async def run(address: str, server: subprocess.Popen, own: list[str]) -> dict:
    bomb = png(Image.new("1", (20_000, 20_000)))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        await speed(client, {})  # warm
        rates = {"long answers": await speed(client, LONG), "short answers": await speed(client, {})}
        found, admitted = await crowd(client, bomb)
        stopped = await stop(client, server)
    good = [r for r in found if r["kind"] in ("asks", "streams", "reads slowly")]
    accepted = [r for r in good if r["status"] == 200]
    ms = [r["ms"] for r in accepted if r["kind"] != "reads slowly"]
    return {
        "speed, requests a second": rates,
        "statuses": {kind: dict(Counter(str(r["status"]) for r in found if r["kind"] == kind)) for kind in dict.fromkeys(KINDS)},
        "answers": {
            "accepted": len(accepted),
            "not whole": sum(r["text"] is None for r in accepted),
            "wrong": sum(r["text"] not in (None, own[r["i"] % QUESTIONS]) for r in accepted),
        },
        "ms p50, p95": np.percentile(ms, [50, 95]).round(1).tolist(),
        "admitted at most": {"seen": admitted, "bound": SLOTS + QUEUE},
        "stop": stopped,
    }


QUERIES = [(png(image), text) for image, text in map(ask, range(QUESTIONS))]


def main() -> None:
    environment = measure.environment()
    with temporary_directory() as aside:
        folder = export.export(models.load("mini-vlm"), f"{aside}/mini", "onnx", "fp32", batches=True)
        exported = inference.load_exported(folder)
        own = [exported.generate(Image.open(io.BytesIO(image)), text, 16) for image, text in QUERIES]
        command = [sys.executable, "-m", "mmrecipes.cli", "serve", str(folder), "--port", "0", "--name", "mini"]
        command += ["--slots", str(SLOTS), "--queue", str(QUEUE), "--max-bytes", str(MAX_BYTES)]
        with subprocess.Popen(command, env=same_packages(), stdout=subprocess.PIPE, text=True) as server:
            try:
                found = asyncio.run(run(server.stdout.readline().split()[-1], server, own))
            finally:
                server.kill()
    knobs = {"clients": CLIENTS, "a second": RATE, "slots": SLOTS, "queue": QUEUE, "users": USERS, "questions": QUESTIONS}
    models.saving.write_json(PATH, {"environment": environment, "knobs": knobs} | found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
