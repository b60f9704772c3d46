"""OpenAI's own client against `mmrecipes serve`, a process of its own on a free port."""

import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from mmrecipes import data, inference
from paths import ROOT
from tests.serve.served import ask, client, process, until

QUESTION = "How many objects are there?"


@pytest.fixture(scope="module")
def house(batched_exports):
    """mini-vlm: its URL, and the export to answer beside it."""
    folder = batched_exports("mini-vlm", "onnx")
    with process(folder, "--name", "mini", "--slots", "3") as (url, _):
        yield client(url), inference.load_exported(folder)


@pytest.fixture(scope="module")
def rows():
    return data.test_split(12)


def said(openai_client, messages, **more) -> str:
    return openai_client.chat.completions.create(model="mini", messages=messages, **more).choices[0].message.content


def test_text_and_images(house, rows):
    server, alone = house
    for row in rows.select(range(3)):
        assert said(server, ask(row["question"], row["image"])) == alone.generate(row["image"], row["question"])
    assert said(server, [{"role": "user", "content": QUESTION}]) == alone.generate(None, QUESTION)
    two = [rows[0]["image"], rows[1]["image"]]
    assert said(server, ask(QUESTION, *two)) == alone.generate(two, QUESTION)


def test_several_turns(house, rows):
    """As OpenAI's client sends them: the answer's own object goes back."""
    server, alone = house
    messages, template = ask(rows[0]["question"], rows[0]["image"]), []
    for text in (rows[0]["question"], QUESTION, "What colour is the circle?"):
        if template:
            messages.append({"role": "user", "content": text})
        template.append({"role": "user", "content": [{"type": "image"}] * (not template) + [{"type": "text", "text": text}]})
        message = server.chat.completions.create(model="mini", messages=messages).choices[0].message
        assert message.content == alone.generate(rows[0]["image"], template)
        messages.append(message)
        template.append({"role": "assistant", "content": message.content})


def test_a_stream_is_the_same_answer_in_pieces(house, rows):
    server, alone = house
    question = "What does the blue square say?"
    given = {"model": "mini", "messages": ask(question, rows[0]["image"]), "logprobs": True}
    chunks = list(server.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    whole = server.chat.completions.create(**given)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == alone.generate(rows[0]["image"], question)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    counts = {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert chunks[-1].usage.model_dump(include=counts) == whole.usage.model_dump(include=counts)
    assert whole.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1  # it was asked a second time
    assert whole.usage.prompt_tokens == alone.inputs(rows[0]["image"], question)["input_ids"].shape[1]
    pieces = [token for chunk in chunks[:-1] if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in pieces] == [token.token for token in whole.choices[0].logprobs.content]
    assert "".join(token.token for token in pieces).strip() == whole.choices[0].message.content
    assert len(pieces) == whole.usage.completion_tokens
    assert all(token.logprob <= 0 for token in pieces)


def test_many_at_once_with_images_of_their_own(house, rows):
    """Twelve images in one size, and so the same token ids for the same question: nobody gets another's answer."""
    server, alone = house
    wanted = [alone.generate(row["image"], row["question"]) for row in rows]
    wanted += [alone.generate(row["image"], QUESTION) for row in rows]
    found = [None] * 24

    def one(i: int) -> None:
        row = rows[i % 12]
        found[i] = said(server, ask(row["question"] if i < 12 else QUESTION, row["image"]))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == wanted
    assert len(set(wanted[12:])) > 1


def test_settings_of_an_answer(house, rows):
    server, alone = house
    messages = ask("What does the blue square say?", rows[0]["image"])
    for name in ("max_tokens", "max_completion_tokens"):
        choice = server.chat.completions.create(model="mini", messages=messages, **{name: 1}).choices[0]
        assert choice.finish_reason in ("length", "stop")
        assert choice.message.content == alone.generate(rows[0]["image"], "What does the blue square say?", max_new_tokens=1)
    colour = ask(rows[0]["question"], rows[0]["image"])
    whole = said(server, colour)
    assert len(whole) > 3
    assert said(server, colour, stop=whole[2:]) == whole[:2]
    drawn = [said(server, messages, temperature=2, seed=seed, max_tokens=4) for seed in (1, 1, -2, 3, 4, 5)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    given = {"model": "mini", "messages": colour, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
    long = server.chat.completions.create(**given)
    assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (20, "length")
    assert long.choices[0].message.content.startswith(whole)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),
        ({"n": 2}, "n"),
        ({"top_p": 0.5}, "top_p"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "What is in <image>?"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, "messages"),
    ],
)
def test_what_is_not_done_here_is_refused(house, given, place):
    messages = [{"role": "user", "content": QUESTION}]
    with pytest.raises(openai.BadRequestError) as e:
        house[0].chat.completions.create(**{"model": "mini", "messages": messages} | given)
    assert e.value.body["type"] == "invalid_request_error"
    assert e.value.body["param"].startswith(place)
    assert "tools are not supported" in e.value.body["message"] or place != "tools"


def test_models_and_what_is_unknown(house):
    assert [model.id for model in house[0].models.list()] == ["mini"]
    assert house[0].models.retrieve("mini").id == "mini"
    with pytest.raises(openai.NotFoundError, match="expected 'mini'"):
        house[0].models.retrieve("maxi")
    with pytest.raises(openai.NotFoundError, match="expected 'mini'"):
        house[0].chat.completions.create(model="maxi", messages=[{"role": "user", "content": "Hello?"}])
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        house[0].embeddings.create(model="mini", input="Hello?")


def test_sigterm_lets_running_answers_end(batched_exports):
    """A random Qwen2.5-VL, which hardly ever stops: 600 tokens have begun, the server is told to go, and all of them come."""
    folder = batched_exports("qwen2_5_vl", "onnx")
    messages = [{"role": "user", "content": QUESTION}]
    with process(folder, "--name", "mini") as (url, run):
        stream = client(url).chat.completions.create(model="mini", messages=messages, max_tokens=600, stream=True)
        pieces = [next(stream), next(stream)]
        with httpx.Client(base_url=url, timeout=None) as other:  # one connection, which stays open
            assert other.get("/health").status_code == 200
            run.send_signal(signal.SIGTERM)
            until(lambda: other.get("/health").status_code == 503)
            refused = other.post("/v1/chat/completions", json={"model": "mini", "messages": messages})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"]
        pieces += stream
        assert run.wait() == 0
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == inference.load_exported(folder).generate(None, QUESTION, max_new_tokens=600)


def test_what_cannot_be_served_is_told_in_one_line(house_exports, batched_exports, tmp_path):
    cases = [((house_exports("onnx", "fp32"),), "batches=True"), ((tmp_path,), "not an exported model")]
    cases += [((batched_exports("mini-vlm", "onnx"), "--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY")]
    for options, said_why in cases:
        command = [sys.executable, "-m", "mmrecipes.cli", "serve", *map(str, options), "--port", "0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert said_why in done.stderr
