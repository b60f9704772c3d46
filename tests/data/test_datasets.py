"""Datasets: the committed test split, balance, calibration, the user's own pictures."""

from collections import Counter

import pytest
from PIL import Image

from mmrecipes import data, models
from mmrecipes.data import families, scenes
from mmrecipes.data.families import FAMILIES
from mmrecipes.errors import UserError


@pytest.fixture(scope="module")
def split():
    return data.test_split()


def test_the_committed_split_is_large_balanced_and_small_on_disk(split):
    assert len(split) >= 4000
    counts = Counter(split["family"][:])
    assert set(counts) == set(FAMILIES) and max(counts.values()) - min(counts.values()) <= 1
    assert len(set(split["seed"][:])) == len(split)  # a picture of its own for each question
    assert (models.data_dir() / data.TEST_FILE).stat().st_size <= 10e6


def test_the_committed_split_is_what_the_code_makes(split):
    made = data.questions("test", len(split) // 100)  # a prefix of the draw is not a prefix of the shuffled file
    stored = {seed: i for i, seed in enumerate(split["seed"][:])}
    for row in made:
        scene = scenes.make_scene(row["seed"])
        twin = split[stored[row["seed"]]]
        assert twin["image"].tobytes() == scenes.render(scene, 128).tobytes() == row["image"].tobytes()
        assert families.ask(scene, twin["family"]).text == twin["question"]
        assert families.ask(scene, twin["family"]).answer == twin["answer"]


def test_majority_floors_are_measured_and_low(split):
    floors = data.majority_floor(split)
    for family in FAMILIES:
        answers = Counter(a for a, f in zip(split["answer"][:], split["family"][:], strict=True) if f == family)
        assert floors[family] == pytest.approx(max(answers.values()) / answers.total())
    assert max(floors[f] for f in ("size", "exists")) < 0.56  # yes/no questions: near a coin
    assert max(floors[f] for f in FAMILIES if f not in ("size", "exists")) < 0.36


def test_calibration_never_meets_training_or_test():
    seeds = data.calibration(40)["seed"][:]
    assert all(s in data.SPLITS["calibration"] for s in seeds)


def test_questions_are_a_pure_function_of_their_arguments():
    one, two = (data.questions("validation", 21, size=96) for _ in range(2))
    assert one[:] == two[:] and one[0]["image"].size == (96, 96)
    assert Counter(one["family"][:]) == dict.fromkeys(FAMILIES, 3)


def test_the_tool_writes_the_split_whole_and_shuffled(tmp_path, split):
    import pyarrow.parquet as pq

    from write_test_split import write_test_split

    table = pq.read_table(write_test_split(tmp_path, 14))
    assert Counter(table["family"].to_pylist()) == dict.fromkeys(FAMILIES, 2)
    assert set(table["seed"].to_pylist()) == set(data.questions("test", 14)["seed"][:]) < set(split["seed"][:])
    assert table["seed"].to_pylist() != sorted(table["seed"].to_pylist())
    assert [p.name for p in tmp_path.iterdir()] == [data.TEST_FILE]


def test_pictures_carry_the_users_question():
    rows = data.image_rows([("a.png", Image.new("RGB", (30, 20), "red"))], "What is this?")
    assert rows[0]["question"] == "What is this?" and rows[0]["image"].size == (30, 20) and "answer" not in rows.column_names


@pytest.mark.parametrize(("call", "match"), [
    (lambda: data.questions("tset", 5), "no split 'tset'.*train, calibration"),
    (lambda: data.questions("test", 0), "0 questions asked"),
    (lambda: data.test_split(10**6), "1000000 test questions asked for.*has"),
])  # fmt: skip
def test_bad_requests_say_what_there_is(call, match):
    with pytest.raises(UserError, match=match):
        call()


def test_novel_questions_are_about_what_no_split_shows():
    rows = data.questions("test", 30, ("colour", "shape", "exists"), novel=True)
    words = (*scenes.NEW_COLOURS, *scenes.NEW_SHAPES)
    assert all(any(w in f"{r['question']} {r['answer']}" for w in words) for r in rows)
    assert {r["answer"] for r in rows if r["family"] == "exists"} == {"yes", "no"}
    assert len(data.questions("test", 14, novel=True)) == 14, "every family can ask about a new thing"
    for seed in range(200):
        new, word = scenes.novel(scenes.make_scene(seed))
        assert [word in t.name for t in new.things].count(True) == 1
        assert not any(w in t.name for t in scenes.make_scene(seed).things for w in words)
    drawn = scenes.make_scene(5)
    assert scenes.render(scenes.novel(drawn)[0]).tobytes() != scenes.render(drawn).tobytes()
