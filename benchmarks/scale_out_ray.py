"""Ray Serve around an exported model: runs in .venv-ray (`make ray`), without PyTorch. scale_out.py calls it.

    scale_out_ray.py EXPORT ROWS FOUND     ROWS: questions with images and answers, FOUND: where the result goes; both JSON

A replica is a process of one thread. Measured are: answers a second with one replica and with two, in turns; the number of
replicas under a load that comes and goes; what becomes of requests when a replica is killed, with and without another attempt.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import io
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = {"host": "127.0.0.1", "port": 8173}
URL = "http://{host}:{port}/".format(**ADDRESS)
ROUNDS, REQUESTS, USERS = 5, 96, 8
REPEATS = 4  # of the requests in a timed round, so that it takes some seconds
ATTEMPTS = (1, 4)  # how often a client sends a request that fails: once, or with patience
PHASES = ((2, 1), (12, 3), (1, 1))  # users at once, and the number of replicas that should follow
SCALING = {
    "min_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 2,  # of one replica, waiting ones included
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2.0,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 5.0,
}
WAIT_S = 240  # for replicas that should come or go; then the benchmark fails


class Replica:
    """One process with the model in it, which answers one request at a time."""

    def __init__(self, folder: str):
        sys.modules.update(torch=None, torchao=None)
        sys.path.insert(0, str(ROOT))
        from mmrecipes.inference import load_exported

        self.model, self.lock = load_exported(folder, threads=1), asyncio.Lock()

    async def __call__(self, request: Any) -> dict:
        from PIL import Image

        asked = await request.json()
        image = Image.open(io.BytesIO(base64.b64decode(asked["image"])))
        async with self.lock:  # the KV cache is the process's own
            answer = await asyncio.to_thread(self.model.generate, [image], asked["question"], 8)
        return {"id": asked["id"], "answer": answer, "pid": os.getpid()}


def deploy(folder: str, **options: Any) -> None:
    from ray import serve

    made = serve.deployment(Replica).options(
        ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=4, health_check_period_s=1, **options
    )
    serve.run(made.bind(folder), route_prefix="/", logging_config={"log_level": "ERROR"})


def replicas() -> int:
    """How many are ready."""
    from ray import serve

    (deployment,) = serve.status().applications["default"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def wait_for(count: int) -> float:
    """Seconds until so many replicas are ready."""
    start = time.perf_counter()
    while replicas() != count:
        if time.perf_counter() - start > WAIT_S:
            raise SystemExit(f"scale_out: {replicas()} replicas after {WAIT_S} s, not {count}")
        time.sleep(0.1)
    return time.perf_counter() - start


async def ask(client: httpx.AsyncClient, row: dict, attempts: int) -> dict:
    """One request, sent again where it fails; {"id", "tries"}, and "answer" and "pid" or what failed."""
    for tries in range(1, attempts + 1):
        try:
            reply = await client.post(URL, json={k: row[k] for k in ("id", "image", "question")})
            if reply.status_code == 200:
                return reply.json() | {"tries": tries}
            failed = str(reply.status_code)
        except httpx.HTTPError as e:
            failed = type(e).__name__
        if tries < attempts:
            await asyncio.sleep(0.5 * 2**tries)
    return {"id": row["id"], "tries": tries, "failed": failed}


async def load(rows: list[dict], users: int, attempts: int = 1, seen: Callable[[dict], None] = lambda _: None) -> list[dict]:
    """So many users, each of whom waits for an answer before the next question; what `ask` gave for every row."""
    queue, found = iter(rows), []

    async def user(client: httpx.AsyncClient) -> None:
        for row in queue:
            found.append(await ask(client, row, attempts))
            seen(found[-1])

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*[user(client) for _ in range(users)])
    return found


def check(found: list[dict], rows: list[dict]) -> None:
    """Every answer has to be the model's own."""
    expected = {row["id"]: row["answer"] for row in rows}
    wrong = [each for each in found if each.get("answer") != expected[each["id"]]]
    if wrong:
        raise SystemExit(f"scale_out: {len(wrong)} of {len(found)} answers are missing or not the model's, such as {wrong[0]}")


def throughput(folder: str, rows: list[dict]) -> dict:
    """Answers a second of one replica and of two, medians of rounds in turns."""
    rates = collections.defaultdict(list)
    for _, count in itertools.product(range(ROUNDS), (1, 2)):
        deploy(folder, num_replicas=count)
        wait_for(count)
        asyncio.run(load(rows, USERS))  # warm-up
        start = time.perf_counter()
        found = asyncio.run(load(rows * REPEATS, USERS))
        rates[count].append(len(found) / (time.perf_counter() - start))
        check(found, rows)
    gains = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "n": REPEATS * len(rows),
        "users": USERS,
        "rounds": ROUNDS,
        "per_s": {str(count): each for count, each in rates.items()},
        "gain": {"median": statistics.median(gains), "range": [min(gains), max(gains)]},
    }


async def phase(rows: list[dict], users: int, wanted: int, trace: list[dict], start: float) -> None:
    """Load of `users` until `wanted` replicas are ready, and three seconds more; a row of the trace each half second."""
    over, found = asyncio.Event(), []

    async def user(client: httpx.AsyncClient, first: int) -> None:
        for i in itertools.count(first):
            if over.is_set():
                return
            found.append(await ask(client, rows[i % len(rows)], 1))

    async with httpx.AsyncClient(timeout=120) as client:
        tasks, until = [asyncio.create_task(user(client, i)) for i in range(users)], None
        begin = time.perf_counter()
        while until is None or time.perf_counter() < until:
            ready, now = await asyncio.to_thread(replicas), time.perf_counter()
            trace.append({"seconds": now - start, "users": users, "replicas": ready, "answers": len(found)})
            if until is None and ready == wanted and now - begin > 3:
                until = now + 3
            if now - begin > WAIT_S:
                raise SystemExit(f"scale_out: {ready} replicas for {users} users, not {wanted}")
            await asyncio.sleep(0.5)
        over.set()
        await asyncio.gather(*tasks)
    check(found, rows)


def autoscaling(folder: str, rows: list[dict]) -> dict:
    """{"settings", "trace"}: users, ready replicas and answers so far, over time."""
    deploy(folder, autoscaling_config=SCALING)
    wait_for(1)
    trace, start = [], time.perf_counter()
    for users, wanted in PHASES:
        asyncio.run(phase(rows, users, wanted, trace, start))
    return {"settings": SCALING, "phases": PHASES, "trace": trace}


def killing(folder: str, rows: list[dict], attempts: int) -> dict:
    """One of two replicas is killed after a quarter of the answers: what becomes of the requests."""
    deploy(folder, num_replicas=2)
    wait_for(2)
    done, killed = itertools.count(1), []

    def seen(reply: dict) -> None:
        if next(done) >= len(rows) // 4 and not killed and "pid" in reply:
            os.kill(reply["pid"], signal.SIGKILL)
            killed.append(time.perf_counter())

    found = asyncio.run(load(rows, USERS, attempts, seen))
    wait_for(2)
    answers = {each["id"]: each["answer"] for each in found if "answer" in each}
    return {
        "n": len(rows),
        "users": USERS,
        "attempts": attempts,
        "answered": len(answers),
        "as the model alone": sum(answers.get(row["id"]) == row["answer"] for row in rows),
        "sent again": sum(each["tries"] > 1 for each in found),
        "failed": dict(collections.Counter(each["failed"] for each in found if "failed" in each)),
        "replicas": len({each["pid"] for each in found if "pid" in each}),
        "two ready after s": time.perf_counter() - killed[0],
    }


def memory_mb() -> dict[str, float]:
    """Of Ray's own processes and of the replicas, MB, pages that they share left out."""
    found: collections.Counter = collections.Counter()
    for process in psutil.Process().children(recursive=True):
        own = "replicas" if any("Replica" in part for part in process.cmdline()) else "Ray"
        found[own] += process.memory_full_info().uss / 1e6
    return dict(found)


def main(folder: str, questions: str, out: str) -> None:
    import ray
    from ray import serve

    rows = json.loads(Path(questions).read_text())[:REQUESTS]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:  # Ray may still write its logs
        start = time.perf_counter()
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="ERROR", _temp_dir=work)
        serve.start(http_options=ADDRESS, logging_config={"log_level": "ERROR"})
        found = {"ray": ray.__version__, "start_s": time.perf_counter() - start}
        for name, run in {"throughput": throughput, "autoscaling": autoscaling}.items():
            found[name] = run(folder, rows)
            print(name, found[name], flush=True)
        found["killed"] = [killing(folder, rows, attempts) for attempts in ATTEMPTS]
        print(found["killed"], flush=True)
        found["memory_mb"] = memory_mb()
        serve.shutdown()
        ray.shutdown()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
