"""Continuous batching answers each prompt as `generate` does alone, whatever arrives, ends, is cancelled or fails beside it."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrecipes import inference
from mmrecipes.errors import ParityError, UserError
from mmrecipes.inference.batching import Answer, Engine, Sampling, log_softmax, settled
from mmrecipes.inference.reuse import FeatureCache, PrefixCache, Prompt
from tests import equality

CASES = equality.cases()
LONGEST = 12


class Model:
    """An export, and what it answers alone: token ids, as many as asked for."""

    def __init__(self, folder):
        self.exported, self.alone = inference.load_exported(folder), inference.load_exported(folder)
        self.known: dict[int, list[int]] = {}

    @functools.cached_property
    def inputs(self) -> list[dict[str, np.ndarray]]:
        return [self.exported.inputs(case.images or None, case.messages) for case in CASES]

    def wanted(self, case: int) -> list[int]:
        if case not in self.known:
            self.known[case] = list(self.alone.tokens(self.inputs[case], LONGEST))
        return self.known[case]

    def text(self, case: int, tokens: int = LONGEST) -> str:
        return self.alone.processor.tokenizer.decode(self.wanted(case)[:tokens], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def foreign(batched_exports) -> Model:
    """A random Qwen2.5-VL, whose images have all sizes and whose positions have three axes; it hardly ever stops."""
    return Model(batched_exports("qwen2_5_vl", "onnx"))


def check(engine: Engine) -> None:
    """What holds after each step: no more rows than slots, and a cache as long as the longest row that runs needs."""
    assert len(engine.rows) <= engine.slots
    if engine.rows:
        assert engine.graphs.places.mask.shape[1] == max(row.held for row in engine.rows)
        if getattr(engine.graphs, "roomy", False):
            assert engine.graphs.lengths.tolist() == [row.held for row in engine.rows]


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, len(CASES) - 1),  # which conversation
        st.integers(0, 8),  # at which step it arrives
        st.integers(1, LONGEST),  # its limit
        st.none() | st.integers(0, 10),  # at which step it is cancelled
    ),
    min_size=1,
    max_size=7,
)


@given(ARRIVALS, st.integers(1, 4))
def test_any_arrivals(foreign, arrivals, slots):
    engine, answers, step = Engine(foreign.exported, slots), {}, 0
    while engine.busy or len(answers) < len(arrivals):
        for i, (case, arrives, most, cancelled) in enumerate(arrivals):
            if arrives == step:
                answers[i] = engine.submit(foreign.inputs[case], Sampling(most))
            if i in answers and cancelled is not None and cancelled <= step:
                answers[i].cancel()
        free = engine.slots - sum(not row.answer.finish_reason and not row.answer.cancelled for row in engine.rows)
        first = [answer for answer in engine.waiting if not answer.cancelled][:free]
        before = {i: answer.text for i, answer in answers.items()}
        engine.step()
        check(engine)
        assert all(answer.finish_reason or answer.tokens for answer in first), "free slots are taken at the next token"
        assert all(answers[i].text.startswith(text) for i, text in before.items())
        step += 1
    for i, (case, _, most, _) in enumerate(arrivals):
        answer, wanted = answers[i], foreign.wanted(case)[:most]
        assert answer.tokens == wanted[: len(answer.tokens)]
        if answer.finish_reason != "cancelled":
            assert answer.tokens == wanted
            assert answer.text == foreign.text(case, most)
            assert answer.finish_reason == ("length" if len(wanted) == most else "stop")
        else:
            assert answer.cancelled


@pytest.mark.parametrize("name", ["mini-vlm", "qwen2_5_vl"])
def test_a_step_writes_into_the_cache_and_copies_none_of_it(name, batched_exports):
    model = Model(batched_exports(name))
    engine = Engine(model.exported, slots=2)
    answers = [engine.submit(inputs, Sampling(8, ignore_eos=True)) for inputs in model.inputs[:2]]
    engine.step()
    graphs, held = engine.graphs, [row.held for row in engine.rows]
    assert graphs.roomy
    buffers = graphs.buffers
    kept = [buffer[i, :, :n].copy() for buffer in buffers for i, n in enumerate(held)]
    engine.step()
    assert graphs.buffers is buffers
    assert all(map(np.array_equal, kept, (buffer[i, :, :n] for buffer in buffers for i, n in enumerate(held))))
    assert all(buffer[i, :, n].any() and not buffer[i, :, n + 1 :].any() for buffer in buffers for i, n in enumerate(held))
    engine.run()
    assert [len(answer.tokens) for answer in answers] == [8, 8]


def test_rows_that_outgrow_their_buffers(batched_exports):
    """Buffers have room for 256 tokens at first; here rows get 200 more than their prompts, the same as alone."""
    exported = inference.load_exported(batched_exports("mini-vlm"))
    graphs, asked = exported.graphs, [exported.inputs(case.images or None, case.messages) for case in CASES[:2]]
    given, singly, caches, following = np.random.default_rng(0).integers(10, 90, (200, 2, 1)), [], [], []
    for i, inputs in enumerate(asked):
        exported.prefill(inputs)
        caches.append(graphs.cache())
        following.append(int(graphs.places.next[0]))
        singly.append([graphs.step(ids[i : i + 1]) for ids in given])
    lengths, rooms, together = [inputs["input_ids"].shape[1] for inputs in asked], set(), []
    graphs.batch(caches, lengths, following)
    for ids in given:
        together.append(graphs.step(ids))
        rooms.add(graphs.buffers[0].shape[2])
    assert len(rooms) > 1 and graphs.lengths.tolist() == [length + 200 for length in lengths]
    together, singly = np.array(together), np.array(singly).swapaxes(0, 1)  # (200, 2, V)
    assert np.abs(together - singly).max() < 1e-4 * np.abs(singly).max()


@pytest.mark.parametrize(("name", "runtime"), [("mini-vlm", "onnx"), ("gemma3", "onnx"), ("minicpmv4_6", "openvino")])
def test_other_models(name, runtime, batched_exports):
    """The trained one, which stops by itself; sliding windows; states of fixed size beside the KV cache."""
    model = Model(batched_exports(name, runtime))
    engine = Engine(model.exported, slots=3)
    answers = [engine.submit(inputs, Sampling(LONGEST - i)) for i, inputs in enumerate(model.inputs)]
    while engine.busy:
        engine.step()
        check(engine)
    assert [answer.tokens for answer in answers] == [model.wanted(i)[: LONGEST - i] for i in range(len(CASES))]
    assert [answer.text for answer in answers] == [model.text(i, LONGEST - i) for i in range(len(CASES))]


# ---- how tokens are chosen


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.sampled_from((0.3, 1.0, 1.7)))
def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(foreign, seed, temperature):
    drawn = Sampling(6, temperature, seed)
    alone = Engine(foreign.exported, 1)
    first = alone.submit(foreign.inputs[0], drawn)
    alone.run()
    crowd = Engine(foreign.exported, 3)
    others = [crowd.submit(inputs, Sampling(8, 1.0)) for inputs in foreign.inputs[1:3]]
    second = crowd.submit(foreign.inputs[0], drawn)
    crowd.run()
    assert second.tokens == first.tokens
    assert np.allclose(second.logprobs, first.logprobs, atol=1e-4)
    assert all(answer.finish_reason for answer in others)


def test_tokens_are_drawn_from_the_softmax(foreign):
    """The mean of -log p of 300 first tokens is the entropy; the bound is five standard errors."""
    engine, temperature = Engine(foreign.exported, 4), 0.8
    answers = [engine.submit(foreign.inputs[6], Sampling(1, temperature, seed)) for seed in range(300)]
    engine.run()
    scores = foreign.alone.scores(foreign.alone.prefill(foreign.inputs[6]), []).astype(np.float64)
    logs, model = log_softmax(scores / temperature), log_softmax(scores)
    surprise = -np.array([logs[answer.tokens[0]] for answer in answers if answer.tokens])
    entropy, spread = -(np.exp(logs) * logs).sum(), np.sqrt((np.exp(logs) * logs**2).sum() - (np.exp(logs) * logs).sum() ** 2)
    assert len(surprise) > 290
    assert abs(surprise.mean() - entropy) < 5 * spread / np.sqrt(len(surprise))
    assert all(np.isclose(answer.logprobs[0], model[answer.tokens[0]], atol=1e-4) for answer in answers if answer.tokens)
    assert len({tuple(answer.tokens) for answer in answers}) > 10


def test_stop_strings(foreign):
    """The text ends before the first of them, however many tokens it spans, and never shows a part of one."""
    whole = foreign.text(0)
    assert len(whole) > 12
    for start, end in ((3, 6), (4, 10), (len(whole) - 3, len(whole))):
        stop = whole[start:end]
        engine = Engine(foreign.exported, 2)
        answer = engine.submit(foreign.inputs[0], Sampling(LONGEST, stop=("no such string", stop)))
        shown = []
        while engine.busy:
            engine.step()
            shown.append(answer.text)
        expected = whole[: whole.index(stop)].rstrip()
        assert (answer.text, answer.finish_reason) == (expected, "stop")
        assert all(expected.startswith(text) for text in shown)
        assert len(answer.tokens) <= LONGEST


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("ab", ("bc",), "a"), ("ab\ufffd", ("b€",), "a"), ("a \n", (), "a"), ("ab", ("ab c", "b d"), ""), ("ab", ("c",), "ab")],
)
def test_what_may_still_become_a_stop_string_is_held_back(text, stop, expected):
    assert settled(text, stop) == expected


def test_settings_that_make_no_sense_are_refused(foreign, house_exports):
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"stop": ("",)}):
        with pytest.raises(UserError, match="expected max_new_tokens"):
            Sampling(**wrong)
    with pytest.raises(UserError, match="1 or more"):
        Engine(foreign.exported, slots=0)
    with pytest.raises(UserError, match="batches=True"):
        Engine(inference.load_exported(house_exports("onnx", "fp32")))
    with pytest.raises(UserError, match="shorten it"):
        Engine(foreign.exported).submit({"input_ids": np.zeros((1, 2048), np.int64)})


def test_an_answer_ends_where_the_cache_is_full(foreign):
    most = foreign.exported.manifest["max_length"]
    ids = np.resize(foreign.inputs[6]["input_ids"], (1, most - 2))
    engine = Engine(foreign.exported)
    answer = engine.submit({"input_ids": ids})
    engine.run()
    assert answer.tokens == list(foreign.alone.tokens({"input_ids": ids}, 64))
    assert len(answer.tokens) == 3
    assert answer.finish_reason == "length"


# ---- what fails


def test_a_prompt_that_fails_harms_nobody(foreign):
    engine = Engine(foreign.exported, 2)
    broken = {name: x for name, x in foreign.inputs[0].items() if name == "input_ids"}
    answers = [engine.submit(each, Sampling(6)) for each in (foreign.inputs[1], broken, foreign.inputs[2], broken)]
    engine.run()
    assert [answer.finish_reason for answer in answers] == ["length", "error", "length", "error"]
    assert "an image is missing" in str(answers[1].error)
    assert [answers[i].tokens for i in (0, 2)] == [foreign.wanted(i)[:6] for i in (1, 2)]


def test_logits_that_are_not_finite_end_one_row(foreign, monkeypatch):
    engine, step = Engine(foreign.exported, 3), foreign.exported.graphs.step
    answers = [engine.submit(inputs, Sampling(6)) for inputs in foreign.inputs[:4]]
    engine.step()

    def spoilt(ids, *more):
        logits = np.array(step(ids, *more))
        if len(ids) == 3:
            logits[1] = np.nan
        return logits

    monkeypatch.setattr(engine.graphs, "step", spoilt)
    engine.step()
    monkeypatch.setattr(engine.graphs, "step", step)
    assert [answer.finish_reason for answer in answers] == [None, "error", None, None]
    assert isinstance(answers[1].error, ParityError)
    engine.run()
    assert [answer.tokens for answer in answers] == [foreign.wanted(i)[: 2 if i == 1 else 6] for i in range(4)]


def test_after_a_step_that_fails_the_engine_goes_on(foreign, monkeypatch):
    engine, step = Engine(foreign.exported, 2), foreign.exported.graphs.step
    answers = [engine.submit(inputs, Sampling(6)) for inputs in foreign.inputs[:4]]
    engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine.graphs, "step", lambda *_: step(np.zeros((1, 0), np.int64)))  # the runtime itself refuses this
        engine.step()
    assert [answer.finish_reason for answer in answers] == ["error", "error", None, None]
    engine.run()
    assert [answers[i].tokens for i in (2, 3)] == [foreign.wanted(i)[:6] for i in (2, 3)]


# ---- visual tokens


def test_an_image_is_encoded_once_and_never_taken_for_another(foreign, monkeypatch):
    """Two images of one size give the same token ids: their content counts."""
    exported, encoded = foreign.exported, []
    encode = exported.graphs.encode
    monkeypatch.setattr(exported.graphs, "encode", lambda run: encoded.append(run) or encode(run))
    image = equality.drawn(64, 64)
    other = image.transpose(0)
    asked = [exported.inputs(each, equality.QUESTION) for each in (image, other, image, other, image)]
    assert all(np.array_equal(each["input_ids"], asked[0]["input_ids"]) for each in asked)
    wanted = [list(foreign.alone.tokens(each, 8)) for each in asked[:2]]
    assert wanted[0] != wanted[1]
    engine = Engine(exported, 2)
    answers = [engine.submit(each, Sampling(8)) for each in asked]
    engine.run()
    assert [answer.tokens for answer in answers] == [wanted[i % 2] for i in range(5)]
    assert len(encoded) == 2
    before = int((asked[0]["input_ids"][0] == exported.manifest["image_token_id"]).argmax())
    whole = asked[0]["input_ids"].shape[1] - 1
    assert [answer.cached for answer in answers] == [0, before, whole, whole, whole]
    assert (engine.features.hits, engine.features.misses) == (3, 2)


def test_what_two_prompts_begin_with_is_read_once(foreign, monkeypatch):
    exported, read = foreign.exported, []
    step, image = exported.graphs.step, equality.drawn(64, 64)
    monkeypatch.setattr(exported.graphs, "step", lambda ids, *more: read.append(ids.shape) or step(ids, *more))
    asked = [exported.inputs(image, question) for question in (equality.QUESTION, "Is there a red square?", "How many?")]
    wanted = [list(foreign.alone.tokens(each, 8)) for each in asked]
    a, b = (each["input_ids"][0] for each in asked[:2])
    alike = int((a[: min(map(len, (a, b)))] == b[: min(map(len, (a, b)))]).argmin())
    engine = Engine(exported, 2)
    answers = [engine.submit(each, Sampling(8)) for each in asked]
    engine.run()
    assert [answer.tokens for answer in answers] == wanted
    assert answers[0].cached == 0 and answers[1].cached == alike > asked[0]["input_ids"].shape[1] / 2
    assert read[:2] == [(1, len(a)), (1, len(b) - alike)]


def test_a_prompt_whose_features_are_not_finite_spoils_no_other(foreign, monkeypatch):
    """Attention lets a NaN through to the tokens before it: such a prompt's cache is not kept."""
    exported, engine = foreign.exported, Engine(foreign.exported, 2)
    with monkeypatch.context() as patched:
        patched.setattr(exported.graphs, "encode", lambda run, encode=exported.graphs.encode: encode(run) + np.float32(np.inf))
        broken = engine.submit(exported.inputs(equality.drawn(64, 64), equality.QUESTION), Sampling(4))
        engine.run()
    assert broken.finish_reason == "error" and isinstance(broken.error, ParityError)
    engine.features = FeatureCache(2**20)  # it holds what the encoder gave
    found = engine.submit(exported.inputs(equality.drawn(64, 64), equality.QUESTION), Sampling(4))
    engine.run()
    wanted = list(foreign.alone.tokens(exported.inputs(equality.drawn(64, 64), equality.QUESTION), 4))
    assert (found.tokens, found.cached) == (wanted, 0)


def test_no_room_for_prompts(foreign):
    engine = Engine(foreign.exported, 2, prefix_bytes=0)
    answers = [engine.submit(foreign.inputs[5], Sampling(4)) for _ in range(2)]
    engine.run()
    assert [(answer.tokens, answer.cached) for answer in answers] == [(foreign.wanted(5)[:4], 0)] * 2
    assert engine.prefixes.bytes == 0


IMAGE = 9
PROMPTS = st.lists(st.sampled_from([1, 2, IMAGE]), min_size=1, max_size=8).flatmap(
    lambda ids: st.tuples(st.just(ids), st.lists(st.integers(0, 1), min_size=ids.count(IMAGE), max_size=ids.count(IMAGE)))
)


@given(st.lists(PROMPTS, min_size=1, max_size=12), st.integers(0, 400))
def test_the_longest_beginning_of_prompts(prompts, limit):
    """Against a comparison token by token, and within the limit."""
    cache, kept = PrefixCache(limit), []
    for ids, features in prompts:
        rows = iter(features)
        told = [(i, next(rows) if i == IMAGE else None) for i in ids]
        x = np.array(ids)
        prompt = Prompt(x, x == IMAGE, np.array(features, np.float32).reshape(-1, 1), None)
        alike = [
            next((i for i, (a, b) in enumerate(zip(told, other, strict=False)) if a != b), min(len(told), len(other)))
            for other in kept
        ]
        found, held = cache.longest(prompt)
        if limit == 400:  # room for all
            assert found == min(max(alike, default=0), len(told) - 1)
        assert found < len(told)
        assert held is None if found == 0 else held[0].shape == (1, 1, found, 1)
        bytes_before, size = cache.bytes, 4 * (len(ids) + len(features))
        cache.add(prompt, [np.zeros((1, 1, len(ids), 1), np.float32)])
        kept.append(told)
        assert cache.bytes <= limit and (cache.bytes == bytes_before if size > limit else cache.bytes >= size)


def test_no_room_for_visual_tokens(foreign):
    engine = Engine(foreign.exported, 2, feature_bytes=0)
    answers = [engine.submit(foreign.inputs[5], Sampling(4)) for _ in range(2)]
    engine.run()
    assert [answer.tokens for answer in answers] == [foreign.wanted(5)[:4]] * 2
    assert engine.features.bytes == engine.features.hits == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=30))
def test_the_cache_of_visual_tokens_is_bounded(uses):
    """Against a list of what was used last."""
    cache, kept = FeatureCache(80), []
    for key, rows in uses:
        if any(key == other for other, _ in kept):
            size = next(size for other, size in kept if other == key)
            assert cache.get(key).nbytes == size
        else:
            assert cache.get(key) is None
            size = 8 * rows
            cache[key] = np.zeros(rows)
        kept = [pair for pair in kept if pair[0] != key] + [(key, size)]
        while sum(size for _, size in kept) > 80:
            kept.pop(0)
        assert cache.bytes == sum(size for _, size in kept) <= 80


def test_pixels_are_let_go_once_they_are_read(foreign):
    answer = Answer(foreign.inputs[0], Sampling(2))
    engine = Engine(foreign.exported)
    engine.add(answer)
    engine.run()
    assert set(answer.inputs) == {"input_ids"}
