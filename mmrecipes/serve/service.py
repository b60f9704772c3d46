"""What stands between the routes and the engine: who is let in, what a request becomes, and what became of it."""

import asyncio
import contextlib
import copy
import hmac
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jinja2
import numpy as np

from mmrecipes.errors import UserError
from mmrecipes.inference.batching import Answer, Engine
from mmrecipes.inference.exported import MANIFEST, Exported
from mmrecipes.models.processors import load_processor
from mmrecipes.serve.images import read_image
from mmrecipes.serve.metrics import Metrics
from mmrecipes.serve.refusals import Refused
from mmrecipes.serve.schema import ChatRequest, ImagePart, parse
from mmrecipes.serve.worker import Update, Worker


@dataclass(frozen=True)
class Limits:
    """What a server takes: `slots` answers run together, `queue` more requests wait, each ends after `seconds`, has a body of
    `body_bytes`, `images` of `pixels` each, and gets `new_tokens`. Images by URL come from `image_hosts` alone. What prompts
    begin with is kept for others, `prefix_bytes` of it."""

    slots: int = 8
    queue: int = 32
    seconds: float = 120.0
    body_bytes: int = 20 * 2**20
    images: int = 8
    pixels: int = 16_000_000
    prompt_tokens: int = 2**31
    new_tokens: int = 1024
    prefix_bytes: int = 128 * 2**20
    image_hosts: tuple[str, ...] = ()


class Job:
    """One admitted request on the event loop: its place, its answer, and the engine's updates as they come."""

    def __init__(self, service: "Service", began: float):
        self.service, self.began = service, began
        self.asked: ChatRequest | None = None
        self.answer: Answer | None = None
        self.timed_out = False
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._tasks: list[asyncio.Task | asyncio.TimerHandle] = []

    def start(self, asked: ChatRequest, answer: Answer, gone: asyncio.Task) -> None:
        """Hand the answer to the engine. It is cancelled when its time is over, and when `gone` ends: its client left."""
        self.asked, self.answer, loop = asked, answer, asyncio.get_running_loop()
        gone.add_done_callback(lambda task: answer.cancel())
        left = self.began + self.service.limits.seconds - time.monotonic()
        self._tasks = [gone, loop.call_later(max(left, 0), self._expire)]

        def tell(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ended at once
                loop.call_soon_threadsafe(self._receive, update)

        self.service.worker.submit(answer, tell)

    def _expire(self) -> None:
        self.timed_out = True
        self.answer.cancel()

    def _receive(self, update: Update) -> None:
        metrics, seconds = self.service.metrics, time.monotonic() - self.began
        if update.tokens and self.service.first(self):
            metrics.first_token.observe(seconds)
        if update.finish_reason:
            metrics.answers.labels(update.finish_reason).inc()
            metrics.prompt_tokens.inc(self.answer.inputs["input_ids"].shape[1])
            metrics.cached_tokens.inc(self.answer.cached)
            metrics.generated_tokens.inc(update.tokens)
            metrics.seconds.observe(seconds)
            for task in self._tasks:
                task.cancel()
            self.service.leave(self)
        self._updates.put_nowait(update)

    async def updates(self) -> AsyncIterator[Update]:
        """Each update up to the last. Refused where the answer did not come to its end."""
        while not (update := await self._updates.get()).finish_reason:
            yield update
        if self.timed_out and update.finish_reason == "cancelled":
            raise Refused(504, f"no answer within {self.service.limits.seconds:g} seconds; ask for fewer tokens", "timeout")
        if update.finish_reason == "cancelled":
            raise Refused(503, "the server is shutting down", "shutting_down", retry_after=5)
        if update.finish_reason == "error":
            print(f"error: {self.answer.error!r}", file=sys.stderr)
            raise Refused(500, "the model failed on this request", "model_error")
        yield update


class Service:
    """One model for many clients. `enter` and `leave` are called on the event loop alone, so they need no lock."""

    def __init__(self, exported: Exported, limits: Limits | None = None, name: str | None = None, key: str | None = None):
        self.limits, self.key = limits or Limits(), key
        self.name, self.exported, self.metrics = name or exported.folder.resolve().name, exported, Metrics()
        self.created = int((exported.folder / MANIFEST).stat().st_mtime)
        self.engine = Engine(exported, self.limits.slots, prefix_bytes=self.limits.prefix_bytes)
        self.reader = copy.copy(exported)  # tokenizers are not for two threads at once, and the engine's decodes
        self.reader.processor = load_processor(exported.folder)
        self.threads = ThreadPoolExecutor(1, "prepare")
        self.jobs: dict[Job, bool] = {}  # admitted, and whether it has a token
        self.draining = False
        self.worker = Worker(self.engine, self._count)

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.worker.close()

    def authorize(self, header: str | None) -> None:
        """Refused where a key is asked for, and this `Authorization` does not hold it."""
        if self.key and not hmac.compare_digest((header or "").encode("latin-1"), f"Bearer {self.key}".encode()):
            raise Refused(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")

    def enter(self) -> Job:
        """A place for one more request; Refused where none is free. It must be called before anything is awaited: whoever looks
        first and takes later lets in all who looked meanwhile."""
        if self.draining:
            raise Refused(503, "the server is shutting down", "shutting_down", retry_after=5)
        if self.worker.failure:
            raise Refused(503, "the engine has failed; start the server again", "engine_failed")
        if len(self.jobs) >= self.limits.slots + self.limits.queue:
            raise Refused(429, "all places are taken; try again later", "queue_full", retry_after=1)
        self.jobs[job := Job(self, time.monotonic())] = False
        self.metrics.admitted.set(len(self.jobs))
        return job

    def leave(self, job: Job) -> None:
        self.jobs.pop(job, None)
        self.metrics.admitted.set(len(self.jobs))

    def first(self, job: Job) -> bool:
        """Whether this is the job's first token; True once."""
        before, self.jobs[job] = self.jobs[job], True
        return not before

    async def prepare(self, body: bytes) -> tuple[ChatRequest, Answer]:
        """What the request in `body` asks for, and its answer to be; in a thread, one after the other. Raises Refused."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, self._prepare, body)

    def _prepare(self, body: bytes) -> tuple[ChatRequest, Answer]:
        asked = parse(body)
        if asked.model != self.name:
            raise Refused(404, f"no model {asked.model!r} here; expected {self.name!r}", "model_not_found", "model")
        sampling = asked.sampling(self.limits.new_tokens)
        return asked, Answer(self._inputs(asked), sampling)

    def _inputs(self, asked: ChatRequest) -> dict[str, np.ndarray]:
        """What the model's processor makes of the messages."""
        limits, turns, urls = self.limits, [], []
        token = getattr(self.reader.processor, "image_token", None)
        for message in asked.messages:
            content = []
            for part in message.parts():
                if isinstance(part, ImagePart):
                    urls.append(part.image_url.url)
                    content.append({"type": "image"})
                elif token and str(token) in part.text:
                    raise Refused(400, f"the text contains {token}, which stands for an image; leave it out", param="messages")
                else:
                    content.append({"type": "text", "text": part.text})
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": content})
        if len(urls) > limits.images:
            raise Refused(400, f"{len(urls)} images; at most {limits.images} a request", "too_many_images", "messages")
        images = [read_image(url, limits.pixels, limits.image_hosts, limits.body_bytes) for url in urls]
        try:
            inputs = self.reader.inputs(images or None, turns)
        except (UserError, jinja2.TemplateError) as e:  # templates refuse roles, or an order of them
            raise Refused(400, str(e), "invalid_prompt", "messages") from e
        if (tokens := inputs["input_ids"].shape[1]) > limits.prompt_tokens:
            raise Refused(400, f"{tokens} tokens; at most {limits.prompt_tokens} a prompt", "context_length_exceeded", "messages")
        return inputs

    def _count(self) -> None:
        """After a step, in the engine's thread."""
        seen = self.engine.features
        self.metrics.running.set(sum(row.answer.finish_reason is None for row in self.engine.rows))
        if self.engine.stepped:
            self.metrics.batch.observe(self.engine.stepped)
        for counter, number in ((self.metrics.image_hits, seen.hits), (self.metrics.image_misses, seen.misses)):
            counter.inc(number - counter._value.get())
