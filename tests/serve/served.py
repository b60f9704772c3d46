"""A server to test: a process of its own, or a thread whose steps wait at a gate."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import uvicorn
from PIL import Image

from mmrecipes import inference
from mmrecipes.serve.app import create_app
from mmrecipes.serve.service import Limits, Service
from paths import ROOT


def client(url: str, key: str = "none") -> openai.OpenAI:
    """Without a time limit of its own, and without second tries."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=None)


@contextlib.contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`mmrecipes serve` on a free port, from when it listens: its URL and the process."""
    command = [sys.executable, "-m", "mmrecipes.cli", "serve", str(folder), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True) as run:
        try:
            line = run.stdout.readline()
            assert line.startswith("serving "), line
            yield line.split()[-1], run
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGKILL)


class Gate:
    """Before each step of the language model with the gate closed, the engine waits, and `arrived` counts it."""

    def __init__(self, graphs):
        self.open, self.arrived, self.step = threading.Event(), threading.Semaphore(0), graphs.step
        self.open.set()
        graphs.step = self._step

    def _step(self, *given):
        if not self.open.is_set():
            self.arrived.release()
            self.open.wait()
        return self.step(*given)


class Served:
    def __init__(self, url: str, service: Service, gate: Gate):
        self.url, self.service, self.gate, self.client = url, service, gate, client(url)

    def metric(self, name: str) -> float:
        """The value of a line of /metrics, 0 where it is not there yet."""
        text = httpx.get(f"{self.url}/metrics", timeout=None).text
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"mmrecipes_{name} ")), 0.0)


@contextlib.contextmanager
def thread(folder: Path, limits: Limits, key: str | None = None) -> Iterator[Served]:
    """The same app in this process, behind a real socket."""
    exported = inference.load_exported(folder, threads=1)
    gate = Gate(exported.graphs)
    service = Service(exported, limits, "tiny", key)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service), http="h11", ws="none", log_level="error"))
    running = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    running.start()
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service, gate)
    finally:
        gate.open.set()
        server.should_exit = True
        running.join()
        service.close()


def until(true) -> None:
    """Wait for what another thread will make true."""
    while not true():
        time.sleep(0.01)


def data_url(image: Image.Image) -> str:
    """Without a loss: the server sees the same pixels."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(text: str, *images: Image.Image | str) -> list[dict]:
    """Messages of one turn; images are drawn ones, or URLs."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
