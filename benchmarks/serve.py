"""`mini-vlm` behind `mmrecipes serve`, asked by clients that behave and by clients that do not: `make load`, 40 minutes.

    clients   CLIENTS of the KINDS below in Poisson arrival: by kind the statuses; wrong and unfinished answers; latency; the most
              requests admitted at any moment
    swapped   the model's directory is replaced by another model's while USERS ask
    stopped   SIGTERM while USERS answers run; then SIGKILL, and a server that starts anew
    no space  the log goes to a device that is full
    soak      all kinds over and over, each with an image of its own, for MINUTES (first argument, 30): memory of the process

An answer is wrong where it is not the one of `Exported.generate`, which answers one at a time. Loopback only. Throughput has a
benchmark of its own, serve_speed.py. Writes results/serve.json.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

from mmrecipes import data, export, inference, measure, models
from mmrecipes.data import families, scenes
from mmrecipes.interrupt import temporary_directory
from mmrecipes.measure.process import same_packages

PATH = Path(__file__).resolve().parent.parent / "results" / "serve.json"
CLIENTS, USERS, QUESTIONS = 200, 8, 64
SLOTS, QUEUE, MAX_BYTES, RATE = 8, 24, 1_000_000, 40.0  # RATE: clients a second
LONG = {"ignore_eos": True, "max_tokens": 400}
GOOD = ("asks", "streams", "reads slowly")
KINDS = ("asks",) * 6 + ("streams",) * 4 + ("reads slowly",) * 3 + ("vanishes", "too large", "broken base64", "bomb")
KINDS += ("wrong JSON", "too long", "10,000 headers", "tools")
CHAT = "/v1/chat/completions"


def ask(i: int) -> tuple[Image.Image, str]:
    """The image and the question number i."""
    scene, start = scenes.make_scene(data.SPLITS["validation"][5000 + i]), i % len(families.FAMILIES)
    order = [*families.FAMILIES[start:], *families.FAMILIES[:start]]
    return scenes.render(scene), next(q.text for q in (families.ask(scene, f, scene.seed) for f in order) if q)


def png(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


BOMB = png(Image.new("1", (20_000, 20_000)))  # 50 KB that become 400 megapixels


def request(image: bytes, text: str, **options) -> dict:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": "mini", "messages": [{"role": "user", "content": content}], "max_tokens": 16, **options}


def body(kind: str, image: bytes, text: str) -> bytes:
    """What a client of this kind sends."""
    asked = request(image, text, stream=kind in ("streams", "reads slowly", "vanishes"))
    if kind == "vanishes":
        asked |= LONG
    if kind == "tools":
        asked["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    if kind == "too long":
        asked["messages"][0]["content"][1]["text"] = "what is there " * 4000
    if kind == "bomb":
        asked = request(BOMB, text)
    if kind == "broken base64":
        asked["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,@@@@"
    sent = json.dumps(asked).encode()
    return sent[:-9] if kind == "wrong JSON" else sent + b" " * MAX_BYTES if kind == "too large" else sent


async def behave(client: httpx.AsyncClient, kind: str, question: tuple[bytes, str]) -> dict:
    """One client: {"kind", "status", "text" (None where the answer is not whole), "ms", "first_ms" of a stream}."""
    headers = {"Content-Type": "application/json"}
    begun, text, first = time.perf_counter(), None, None
    try:
        if kind == "10,000 headers":
            status = await many_headers(client.base_url, body(kind, *question))
            return {"kind": kind, "status": status, "text": None, "ms": 1e3 * (time.perf_counter() - begun)}
        async with client.stream("POST", CHAT, content=body(kind, *question), headers=headers) as reply:
            status = reply.status_code
            if status == 200 and kind in ("streams", "reads slowly", "vanishes"):
                text, first = await read_stream(reply, kind)
            else:
                found = json.loads(await reply.aread()) if status == 200 else {}
                text = found["choices"][0]["message"]["content"] if found else None
    except (httpx.HTTPError, ValueError) as e:
        status = type(e).__name__
    times = {"ms": 1e3 * (time.perf_counter() - begun), "first_ms": 1e3 * (first - begun) if first else None}
    return {"kind": kind, "status": status, "text": text, **times}


async def many_headers(url: httpx.URL, content: bytes) -> int | str:
    """By a bare connection: httpx needs seconds for so many headers, in which no other client here gets on."""
    reading, writing = await asyncio.open_connection(url.host, url.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    with contextlib.closing(writing):
        try:
            writing.write(head.encode() + b"".join(b"X-%d: 1\r\n" % n for n in range(10_000)) + b"\r\n" + content)
            await writing.drain()
            return int((await reading.readline()).split()[1])
        except (OSError, IndexError) as e:
            return type(e).__name__


async def read_stream(reply: httpx.Response, kind: str) -> tuple[str | None, float | None]:
    """The text of a stream that ends in [DONE], None for others and for a client that leaves after the first piece; and when
    that piece came."""
    text, first = "", None
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            return text, first
        if line.startswith("data: "):
            piece = json.loads(line[6:])
            text += (piece["choices"][0]["delta"].get("content") or "") if piece.get("choices") else ""
            first = first or (time.perf_counter() if text else None)
            if kind == "vanishes" and text:
                return None, first
            await asyncio.sleep(0.1 if kind == "reads slowly" else 0)
    return None, first


def counted(found: list[dict]) -> dict:
    """Statuses by kind; of the clients that behave, how many answers were accepted, not whole, and not `own`."""
    good = [r for r in found if r["kind"] in GOOD]
    accepted = [r for r in good if r["status"] == 200]
    kinds = dict.fromkeys(r["kind"] for r in found)
    return {
        "statuses": {k: dict(Counter(str(r["status"]) for r in found if r["kind"] == k)) for k in kinds},
        "accepted": len(accepted),
        "not whole": sum(r["text"] is None for r in accepted),
        "wrong": sum(r["text"] not in (None, r["own"]) for r in accepted),
    }


async def crowd(client: httpx.AsyncClient, own: list[str]) -> dict:
    rng, running, admitted, done = random.Random(0), [], [0], asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            lines = (await client.get("/metrics")).text.splitlines()
            admitted.append(int(float(next(x.split()[1] for x in lines if x.startswith("mmrecipes_requests_admitted ")))))
            await asyncio.sleep(0.05)

    async def one(kind: str, i: int) -> dict:
        return await behave(client, kind, QUERIES[i]) | {"own": own[i]}

    watching = asyncio.create_task(watch())
    for i in range(CLIENTS):
        running.append(asyncio.create_task(one(rng.choice(KINDS), i % QUESTIONS)))
        await asyncio.sleep(rng.expovariate(RATE))
    found = [await each for each in running]
    done.set()
    await watching
    told = [r for r in found if r["status"] == 200 and r["kind"] in ("asks", "streams")]
    seen = {"ms": [r["ms"] for r in told], "first_ms": [r["first_ms"] for r in told if r["first_ms"]]}
    latency = {
        name: dict(zip(("p50", "p95", "n"), [*np.percentile(ms, [50, 95]), len(ms)], strict=True)) for name, ms in seen.items()
    }
    return counted(found) | latency | {"admitted at most": {"seen": max(admitted), "bound": SLOTS + QUEUE}}


async def asking(client: httpx.AsyncClient, own: list[str], seconds: float, kinds: tuple[str, ...] = ("asks",)) -> dict:
    """USERS clients that ask one question after the other."""
    found, end = [], time.monotonic() + seconds

    async def one(user: int) -> None:
        rng, i = random.Random(user), user
        while time.monotonic() < end:
            found.append(await behave(client, rng.choice(kinds), QUERIES[i % QUESTIONS]) | {"own": own[i % QUESTIONS]})
            i += USERS

    await asyncio.gather(*map(one, range(USERS)))
    return counted(found)


async def swapped(client: httpx.AsyncClient, own: list[str], folder: Path, other: Path) -> dict:
    """Another model's files under the server's name, after a second."""

    async def swap() -> None:
        await asyncio.sleep(1)
        folder.rename(folder.with_name("old"))
        other.rename(folder)

    found, _ = await asyncio.gather(asking(client, own, 3), swap())
    folder.rename(other)
    folder.with_name("old").rename(folder)
    return found


async def stopped(client: httpx.AsyncClient, server: subprocess.Popen, sign: signal.Signals) -> dict:
    """A signal once USERS streams have begun: how many became whole, what a new request gets, the exit code."""
    begun = asyncio.Barrier(USERS + 1)

    async def one(i: int) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            async with client.stream("POST", CHAT, json=request(*QUERIES[i], stream=True, **LONG)) as reply:
                lines = reply.aiter_lines()
                await anext(lines)
                await begun.wait()
                return "data: [DONE]" in [line async for line in lines]
        return False

    running = [asyncio.create_task(one(i)) for i in range(USERS)]
    await begun.wait()
    server.send_signal(sign)
    late = await behave(client, "asks", QUERIES[0])
    whole = sum([await each for each in running])
    return {"running": USERS, "whole": whole, "a new request": late["status"], "exit code": await asyncio.to_thread(server.wait)}


async def soak(client: httpx.AsyncClient, server: subprocess.Popen, minutes: float) -> dict:
    """Memory of the server, MB, each half minute; in the second half its caches are taken for full."""
    process, begun, told, running = psutil.Process(server.pid), time.monotonic(), [], Counter()
    end, numbers = begun + 60 * minutes, iter(range(10**9))

    async def one(user: int) -> None:
        rng = random.Random(user)
        while time.monotonic() < end:
            image, text = ask(QUESTIONS + next(numbers))
            found = await behave(client, rng.choice(KINDS), (png(image), text))
            running[f"{found['kind']}: {found['status']}"] += 1

    users = [asyncio.create_task(one(user)) for user in range(USERS)]
    while time.monotonic() < end:
        await asyncio.sleep(min(30, 3 * minutes))
        told.append({"minute": (time.monotonic() - begun) / 60, "mb": process.memory_info().rss / 2**20})
    await asyncio.gather(*users)
    late = [r for r in told if r["minute"] >= minutes / 2]
    slope = float(np.polyfit([r["minute"] for r in late], [r["mb"] for r in late], 1)[0])
    threads, files = process.num_threads(), process.num_fds()
    return {
        "statuses": dict(running),
        "minutes": minutes,
        "MB a minute, second half": slope,
        "threads": threads,
        "open files": files,
        "memory": told,
    }


@contextlib.contextmanager
def serving(folder: Path, log: int | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """The server on a port of its own: its address and its process. `log` takes its stderr."""
    command = [sys.executable, "-m", "mmrecipes.cli", "serve", str(folder), "--port", "0", "--name", "mini"]
    command += ["--slots", str(SLOTS), "--queue", str(QUEUE), "--max-bytes", str(MAX_BYTES)]
    with subprocess.Popen(command, env=same_packages(), stdout=subprocess.PIPE, stderr=log, text=True) as server:
        try:
            yield server.stdout.readline().split()[-1], server
        finally:
            server.kill()


def client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=address, timeout=300, limits=httpx.Limits(max_connections=None))


async def everything(folder: Path, other: Path, own: list[str], minutes: float) -> dict:
    found: dict = {}
    with serving(folder) as (address, server):
        async with client(address) as asks:
            await asking(asks, own, 1)  # warm
            found["clients"] = await crowd(asks, own)
            found["swapped"] = await swapped(asks, own, folder, other)
            found["SIGTERM"] = await stopped(asks, server, signal.SIGTERM)
    with serving(folder) as (address, server):
        async with client(address) as asks:
            found["SIGKILL"] = await stopped(asks, server, signal.SIGKILL)
    full = os.open("/dev/full", os.O_WRONLY)
    with serving(folder, full) as (address, _):
        async with client(address) as asks:
            found["started anew, no space for its log"] = await asking(asks, own, 3, KINDS)
    os.close(full)
    with serving(folder) as (address, server):
        async with client(address) as asks:
            found["soak"] = await soak(asks, server, minutes)
    return found


QUERIES = [(png(image), text) for image, text in map(ask, range(QUESTIONS))]


def main(minutes: float) -> None:
    environment = measure.environment()
    with temporary_directory() as aside:
        model = models.load("mini-vlm")
        folder = export.export(model, aside / "mini", "onnx", "fp32", batches=True)
        exported = inference.load_exported(folder)
        own = [exported.generate(Image.open(io.BytesIO(image)), text, 16) for image, text in QUERIES]
        for p in model.parameters():  # the other model: its answers are others
            p.data.mul_(0.5)
        other = export.export(model, aside / "other", "onnx", "fp32", batches=True)
        found = asyncio.run(everything(folder, other, own, minutes))
    knobs = {"clients": CLIENTS, "a second": RATE, "slots": SLOTS, "queue": QUEUE, "users": USERS, "questions": QUESTIONS}
    models.saving.write_json(PATH, {"environment": environment, "model": "mini-vlm, ONNX Runtime fp32", "knobs": knobs} | found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    minutes = sys.argv[1] if len(sys.argv) > 1 else "30"
    if not minutes.replace(".", "", 1).isdigit():
        raise SystemExit(f"serve: a soak of {minutes!r} minutes; expected a number")
    main(float(minutes))
