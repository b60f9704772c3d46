"""Every limit of the server, deterministically: the engine waits at a gate while requests come, wait and leave."""

import base64
import io
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import openai
import pytest
from PIL import Image

from mmrecipes import inference
from mmrecipes.serve.images import download, is_public, public_address, read_image
from mmrecipes.serve.refusals import Refused
from mmrecipes.serve.service import Limits
from tests.equality import QUESTION, drawn
from tests.serve.served import ask, client, thread, until

SMALL = Limits(slots=1, queue=1, body_bytes=100_000, images=2, pixels=50_000, prompt_tokens=200, new_tokens=40)
TEXT = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def folder(batched_exports):
    """A random Qwen2.5-VL, whose answers are as long as they may be."""
    return batched_exports("qwen2_5_vl", "onnx")


@pytest.fixture(scope="module")
def server(folder):
    with thread(folder, SMALL) as served:
        yield served


class Asking(threading.Thread):
    """A request in the background; `answer` waits for its text, or raises what it raised."""

    def __init__(self, served, messages=TEXT, **more):
        super().__init__()
        self.result, self.create = queue.SimpleQueue(), served.client.chat.completions.create
        self.given = {"model": "tiny", "messages": messages, "max_tokens": 12} | more
        self.start()

    def run(self):
        try:
            self.result.put(self.create(**self.given).choices[0].message.content)
        except Exception as e:
            self.result.put(e)

    def answer(self) -> str:
        found = self.result.get()
        if isinstance(found, Exception):
            raise found
        return found


def alone(served, images=None, tokens=12) -> str:
    """What the same export answers without a server."""
    return inference.load_exported(served.service.exported.folder, threads=1).generate(images, QUESTION, tokens)


def hold(served, **more) -> Asking:
    """A request that stands in the engine, at the closed gate."""
    served.gate.open.clear()
    running = Asking(served, **more)
    served.gate.arrived.acquire()
    return running


def test_a_full_queue_is_told_at_once(server):
    """One runs, one waits, the third is refused; the two get their answers."""
    running = hold(server)
    waiting = Asking(server, ask(QUESTION, drawn(64, 64)))
    until(lambda: len(server.service.jobs) == 2)
    with pytest.raises(openai.RateLimitError) as e:
        server.client.chat.completions.create(model="tiny", messages=TEXT)
    assert e.value.body["code"] == "queue_full"
    assert int(e.value.response.headers["retry-after"]) >= 1
    server.gate.open.set()
    assert running.answer() == alone(server, None, 12)
    assert waiting.answer() == alone(server, drawn(64, 64), 12)
    until(lambda: not server.service.jobs)


def test_64_at_once_get_no_more_than_the_places(server):
    """A server that looks, awaits, and then takes a place would let all of them in."""
    running, before = hold(server), server.metric('requests_total{status="429"}')
    others = [Asking(server) for _ in range(64)]
    until(lambda: server.metric('requests_total{status="429"}') - before == 63)
    assert len(server.service.jobs) == 2
    server.gate.open.set()
    answers = [running.result.get(), *(other.result.get() for other in others)]
    assert sum(isinstance(answer, openai.RateLimitError) for answer in answers) == 63
    assert [answer for answer in answers if isinstance(answer, str)] == [alone(server, None, 12)] * 2


def test_a_client_that_leaves_frees_its_slot(server):
    before = server.metric('answers_total{finish_reason="cancelled"}')
    server.gate.open.clear()
    body = {"model": "tiny", "messages": TEXT, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=None) as response:
        assert response.status_code == 200
        server.gate.arrived.acquire()
        waiting = Asking(server)
        until(lambda: len(server.service.jobs) == 2)
        (left,) = [job for job in server.service.jobs if job.asked and job.asked.stream]
    until(lambda: left.answer.cancelled)
    server.gate.open.set()
    assert waiting.answer() == alone(server, None, 12)
    assert left.answer.finish_reason == "cancelled"
    assert len(left.answer.tokens) <= 2, "it ended at the next step"
    assert server.metric('answers_total{finish_reason="cancelled"}') == before + 1


def test_time_is_limited(folder):
    """Of a running and of a waiting request, whole and as a stream."""
    with thread(folder, Limits(slots=1, queue=2, seconds=0.5)) as served:
        running = hold(served)
        waiting = Asking(served)
        body = {"model": "tiny", "messages": TEXT, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=None) as response:
            until(lambda: len(served.service.jobs) == 3 and all(j.answer and j.answer.cancelled for j in served.service.jobs))
            served.gate.open.set()
            lines = [line for line in response.iter_lines() if line]
        for each in (running, waiting):
            with pytest.raises(openai.InternalServerError, match=r"within 0\.5 seconds") as e:
                each.answer()
            assert (e.value.status_code, e.value.body["code"]) == (504, "timeout")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert not served.service.jobs


def test_a_body_is_counted_while_it_is_read(server):
    """In chunks, without a Content-Length that says how long it will be."""

    def endless():
        for _ in range(30):
            yield b" " * 10_000

    kind = {"Content-Type": "application/json"}
    found = httpx.post(f"{server.url}/v1/chat/completions", content=endless(), headers=kind, timeout=None)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")
    noise = Image.effect_noise((200, 200), 90)
    with pytest.raises(openai.APIStatusError, match="more than 100,000 bytes"):
        server.client.chat.completions.create(model="tiny", messages=ask(QUESTION, noise, noise, noise))
    assert not server.service.jobs


def test_a_body_that_is_not_json(server):
    url = f"{server.url}/v1/chat/completions"
    found = httpx.post(url, content=b'{"model": ', headers={"Content-Type": "application/json"}, timeout=None)
    assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")
    found = httpx.post(url, content=json.dumps({"model": "tiny", "messages": TEXT}), timeout=None)  # as a form of a web page can
    assert (found.status_code, found.json()["error"]["code"]) == (415, "unsupported_media_type")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def as_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


BOMB = png(Image.new("1", (20_000, 10_000)))  # 25 MB of pixels in 25 KB


@pytest.mark.parametrize(
    ("urls", "code"),
    [
        ([as_url(BOMB)], "image_too_large"),
        ([as_url(png(drawn(300, 200)))], "image_too_large"),
        ([as_url(png(drawn(64, 64)))] * 3, "too_many_images"),
        ([as_url(b"no image")], "invalid_image"),
        ([as_url(png(drawn(64, 64))[:200])], "invalid_image"),
        (["data:image/png;base64,???"], "invalid_image"),
        (["data:image/png,abc"], "invalid_image"),
        (["file:///etc/hostname"], "invalid_image"),
        (["http://[/a.png"], "invalid_image"),
        (["http://127.0.0.1/a.png"], "host_not_allowed"),
        (["https://example.com/a.png"], "host_not_allowed"),
    ],
)
def test_images_that_are_refused(server, urls, code):
    with pytest.raises(openai.BadRequestError) as e:
        server.client.chat.completions.create(model="tiny", messages=ask(QUESTION, *urls))
    assert e.value.body["code"] == code


def test_tokens_are_limited(server):
    with pytest.raises(openai.BadRequestError, match="at most 200 a prompt"):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 300}])
    with pytest.raises(openai.BadRequestError, match="at most 40 an answer"):
        server.client.chat.completions.create(model="tiny", messages=TEXT, max_tokens=41)
    assert server.client.chat.completions.create(model="tiny", messages=TEXT).usage.completion_tokens <= 40


def test_the_api_key(folder):
    with thread(folder, SMALL, key="a long secret") as served:
        for key in ("wrong", "a long secret, and more", "größe"):
            found = httpx.get(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()}, timeout=None)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            client(served.url, "wrong").chat.completions.create(model="tiny", messages=TEXT)
        assert httpx.get(f"{served.url}/metrics", timeout=None).status_code == 401
        assert httpx.get(f"{served.url}/health", timeout=None).json() == {"status": "ok"}
        served.client = client(served.url, "a long secret")
        assert Asking(served).answer() == alone(served, None, 12)


def test_metrics_tell_what_happened(folder):
    """Seven answers, two of them to the same image, a refused request and an unknown model, counted by hand."""
    with thread(folder, Limits(slots=3)) as served:
        images = [drawn(64, 64), drawn(64, 64), drawn(96, 48)]
        asked = [ask(QUESTION, image) for image in images] + [TEXT] * 4
        found = [served.client.chat.completions.create(model="tiny", messages=each, max_tokens=9) for each in asked]
        for wrong in ({"model": "other"}, {"n": 2}):
            with pytest.raises(openai.APIStatusError):
                served.client.chat.completions.create(**{"model": "tiny", "messages": TEXT} | wrong)
        until(lambda: served.metric("answer_seconds_count") == 7)
        assert served.metric("prompt_tokens_total") == sum(each.usage.prompt_tokens for each in found)
        cached = [each.usage.prompt_tokens_details.cached_tokens for each in found]
        assert served.metric("prompt_tokens_cached_total") == sum(cached)
        assert served.metric("generated_tokens_total") == sum(each.usage.completion_tokens for each in found)
        statuses = [served.metric(f'requests_total{{status="{status}"}}') for status in (200, 400, 404)]
        assert statuses == [7, 1, 1]
        reasons = [each.choices[0].finish_reason for each in found]
        for reason in ("length", "stop"):
            assert served.metric(f'answers_total{{finish_reason="{reason}"}}') == reasons.count(reason)
        assert (served.metric("image_cache_hits_total"), served.metric("image_cache_misses_total")) == (1, 2)
        assert served.metric("first_token_seconds_count") == 7
        assert served.metric("requests_admitted") == served.metric("requests_running") == 0
        assert served.metric("batch_rows_count") == sum(
            each.usage.completion_tokens - (r == "length") for each, r in zip(found, reasons, strict=True)
        )


def test_an_engine_that_breaks_is_seen(folder):
    with thread(folder, SMALL) as served:
        served.service.engine.graphs.batch = None  # what no prompt could do
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            Asking(served).answer()
        until(lambda: served.service.worker.failure)
        assert httpx.get(f"{served.url}/health", timeout=None).status_code == 503
        with pytest.raises(openai.InternalServerError, match="start the server again"):
            Asking(served).answer()
        assert not served.service.jobs


# ---- images by URL


class Files(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        self.send_response({"/moved": 302}.get(self.path, 200))
        self.send_header("Location", "/a.png")
        self.end_headers()
        self.wfile.write(png(drawn(64, 64)))

    def log_message(self, *_):
        pass


def test_a_download_is_bounded_and_follows_nothing():
    with HTTPServer(("127.0.0.1", 0), Files) as web:
        web.asked, port = [], web.server_address[1]
        threading.Thread(target=web.serve_forever, daemon=True).start()
        base = f"http://images.example:{port}"
        whole = png(drawn(64, 64))
        assert download(f"{base}/a.png?b=1", "127.0.0.1", 10**6) == whole
        assert web.asked == [("/a.png?b=1", f"images.example:{port}")], "the name is told, the address is ours"
        with pytest.raises(Refused, match="more than 100 bytes"):
            download(f"{base}/a.png", "127.0.0.1", 100)
        with pytest.raises(Refused, match="status 302"):
            download(f"{base}/moved", "127.0.0.1", 10**6)
        web.shutdown()
    with pytest.raises(Refused, match="could not be read"):
        download(f"{base}/a.png", "127.0.0.1", 100)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]", "10.1.2.3", "169.254.169.254", "[::ffff:192.168.0.1]", "0.0.0.0"]
)
def test_a_url_never_leads_into_a_private_network(host):
    with pytest.raises(Refused, match=r"not public|no address"):
        public_address(f"http://{host}:80/a.png", (host.strip("[]"),))
    with pytest.raises(Refused, match="not allowed"):
        read_image(f"http://{host}/a.png", 100, ("example.com",), 100)


def test_addresses():
    private = ("192.168.1.1", "100.64.0.1", "fe80::1%eth0", "fc00::1", "224.0.0.1", "::", "2002:7f00:1::", "64:ff9b::7f00:1")
    assert not any(map(is_public, private))
    assert is_public("8.8.8.8") and is_public("2606:4700:4700::1111")
