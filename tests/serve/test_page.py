"""The chat page: the same for everybody, with nothing from elsewhere. `tools/chat_page.py` talks through it in a browser."""

import base64
import hashlib
import re

import httpx
import pytest

from mmrecipes.serve.service import Limits
from tests.serve.served import thread


@pytest.fixture(scope="module")
def guarded(batched_exports):
    """A server that asks for a key."""
    with thread(batched_exports("mini-vlm"), Limits(), key="secret") as served:
        yield served


def test_the_page_needs_no_key_and_tells_none(guarded):
    page = httpx.get(guarded.url)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "secret" not in page.text + str(page.headers)
    assert guarded.service.name not in page.text.replace("mmrecipes", "")
    asked = httpx.post(f"{guarded.url}/v1/chat/completions", json={"model": "tiny", "messages": []})
    assert (httpx.get(f"{guarded.url}/v1/models").status_code, asked.status_code) == (401, 401)
    assert httpx.post(guarded.url).status_code == 405


def test_nothing_comes_from_elsewhere_and_no_text_becomes_html(guarded):
    page = httpx.get(guarded.url)
    assert not re.search(r"https?:|//\w|<link|<script src|<iframe|@import", page.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\son\w+=\"", page.text)
    assert not re.search("localStorage|sessionStorage|cookie", page.text)  # the key is kept nowhere


def test_only_the_pages_own_script_may_run(guarded):
    page = httpx.get(guarded.url)
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    (script,) = re.findall("<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (rules["default-src"], rules["script-src"], rules["connect-src"]) == ("'none'", f"'sha256-{digest}'", "'self'")
    assert rules["frame-ancestors"] == "'none'"


def test_what_the_page_sends_is_what_the_server_takes(guarded):
    """The addresses and fields in its script, with the key in the header that it sets."""
    page = httpx.get(guarded.url).text
    assert 'request("v1/models")' in page and 'request("v1/chat/completions", { model, messages: asked, stream: true })' in page
    headers = {"Authorization": "Bearer secret"}
    model = httpx.get(f"{guarded.url}/v1/models", headers=headers).json()["data"][0]["id"]
    asked = {"model": model, "messages": [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}], "stream": True}
    reply = httpx.post(f"{guarded.url}/v1/chat/completions", json=asked, headers=headers, timeout=None)
    assert (reply.status_code, reply.text.rstrip().splitlines()[-1]) == (200, "data: [DONE]")
