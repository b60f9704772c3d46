"""The routes: /v1/chat/completions, /v1/models, /health, /metrics, and at / a page to chat with. Errors are in OpenAI's form."""

import asyncio
import base64
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrecipes.serve.refusals import Refused
from mmrecipes.serve.service import Job, Service

CHAT = "/v1/chat/completions"
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
SCRIPT = hashlib.sha256(PAGE.split("<script>")[1].split("</script>")[0].encode()).digest()
# no script but the page's own, nothing from elsewhere, nothing to elsewhere, and no page of somebody else around it
PAGE_POLICY = (
    f"default-src 'none'; script-src 'sha256-{base64.b64encode(SCRIPT).decode()}'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DISCARD_SECONDS = 5  # how long a body that is refused is still read, so that its sender gets to see why


def create_app(service: Service) -> FastAPI:
    """The app around one model, for uvicorn or any other ASGI server, in one process."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(CountStatus, service=service)

    @app.exception_handler(Refused)
    async def refused(request: Request, e: Refused) -> Response:
        return JSONResponse(e.body, e.status, e.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, e: HTTPException) -> Response:
        return JSONResponse(Refused(e.status_code, f"{request.method} {request.url.path}: {e.detail}").body, e.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, e: Exception) -> Response:  # uvicorn prints the traceback
        return JSONResponse(Refused(500, "the server failed on this request").body, 500)

    @app.get("/")
    async def page() -> Response:
        """The same for everybody, so no key is asked for; what it sends carries the key that its user types."""
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return HTMLResponse(PAGE, headers=headers | {"Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> Response:
        state = "failed" if service.worker.failure else "draining" if service.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.authorize(request.headers.get("authorization"))
        return PlainTextResponse(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.authorize(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [about(service)]})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        service.authorize(request.headers.get("authorization"))
        if name != service.name:
            raise Refused(404, f"no model {name!r} here; expected {service.name!r}", "model_not_found", "model")
        return JSONResponse(about(service))

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await answer(service, request)

    return app


async def answer(service: Service, request: Request) -> Response:
    """The answer to one request to /v1/chat/completions, whole or as a stream."""
    body, job = Body(request), None
    try:
        service.authorize(request.headers.get("authorization"))
        job = service.enter()
        async with asyncio.timeout(service.limits.seconds):
            asked, begun = await service.prepare(await body.read(service.limits.body_bytes))
    except TimeoutError as e:
        service.leave(job)
        raise Refused(408, f"the request did not arrive within {service.limits.seconds:g} seconds", "timeout") from e
    except BaseException as e:
        if job:
            service.leave(job)
        if isinstance(e, Refused):
            await body.discard(service.limits.body_bytes)
        raise
    job.start(asked, begun, asyncio.create_task(body.gone()))
    if asked.stream:
        return StreamingResponse(stream(job), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    async for update in job.updates():
        last = update
    message = {"role": "assistant", "content": last.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": logprobs(job, 0), "finish_reason": last.finish_reason}
    return JSONResponse(envelope(job, "chat.completion") | {"choices": [choice], "usage": usage(job)})


async def stream(job: Job) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each update, the usage where it is asked for, [DONE]; or an error, and no [DONE]."""
    head, sent, tokens = envelope(job, "chat.completion.chunk"), 0, 0
    more = {"usage": None} if job.asked.stream_options.include_usage else {}

    def chunk(delta: dict, finish_reason: str | None = None, since: int | None = None) -> str:
        spoken = None if since is None else logprobs(job, since)
        choice = {"index": 0, "delta": delta, "logprobs": spoken, "finish_reason": finish_reason}
        return event(head | {"choices": [choice]} | more)

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for update in job.updates():
            if update.text[sent:] or (update.tokens > tokens and job.asked.logprobs):
                yield chunk({"content": update.text[sent:]}, since=tokens)
            sent, tokens = len(update.text), update.tokens
            if update.finish_reason:
                yield chunk({}, update.finish_reason)
        if more:
            yield event(head | {"choices": [], "usage": usage(job)})
        yield "data: [DONE]\n\n"
    except Refused as e:
        yield event(e.body)


def event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def envelope(job: Job, kind: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": job.service.name}


def usage(job: Job) -> dict[str, object]:
    prompt, generated = job.answer.inputs["input_ids"].shape[1], len(job.answer.tokens)
    counted = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
    return counted | {"prompt_tokens_details": {"cached_tokens": job.answer.cached}}


def logprobs(job: Job, since: int) -> dict | None:
    """OpenAI's form of the log-probabilities of the tokens from number `since` on; None where they are not asked for."""
    if not job.asked.logprobs:
        return None
    decode, content = job.service.exported.processor.tokenizer.decode, []
    for token, value in zip(job.answer.tokens[since:], job.answer.logprobs[since:], strict=False):  # both grow meanwhile
        text = decode([token])
        exact = None if "\ufffd" in text else list(text.encode())
        content.append({"token": text, "logprob": value, "bytes": exact, "top_logprobs": []})
    return {"content": content, "refusal": None}


def about(service: Service) -> dict:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "mmrecipes"}


class Body:
    """A request's body, read no further than it may be, whatever its header says."""

    def __init__(self, request: Request):
        self.receive, self.unread = request.receive, True
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.json = kind == "application/json"

    async def read(self, most: int) -> bytes:
        """All of it; Refused where it is not JSON by its header, or longer than `most` bytes."""
        if not self.json:  # what a browser sends for any page without asking first has another type
            raise Refused(415, "expected Content-Type: application/json", "unsupported_media_type")
        content = bytearray()
        while self.unread:
            content += await self._next()
            if len(content) > most:
                raise Refused(413, f"the body has more than {most:,} bytes", "body_too_large")
        return bytes(content)

    async def discard(self, most: int) -> None:
        """Read on for a while, and forget it: a connection that is closed while its client writes loses the refusal."""
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while self.unread and most > 0:
                    most -= len(await self._next())
        except (TimeoutError, Refused):
            pass

    async def gone(self) -> None:
        """Returns when the client has left, or has got its answer."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> bytes:
        message: Message = await self.receive()
        if message["type"] == "http.disconnect":
            self.unread = False
            raise Refused(400, "the client left before the body was complete", "client_left")
        self.unread = message.get("more_body", False)
        return message.get("body", b"")


class CountStatus:
    """Middleware that counts requests for answers by the status they get."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        if scope.get("path") != CHAT:
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, receive, counted)
        except Exception:  # answered further out
            self.service.metrics.requests.labels("500").inc()
            raise
