"""Training: what a batch is, that the losses learn, and that a killed run resumes to the same weights."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import tiny
from mmrecipes import data, distill, models, train
from mmrecipes.data import families, scenes
from mmrecipes.errors import UserError
from mmrecipes.mini import batches as mini_batches
from mmrecipes.mini import labels, losses, vlm
from mmrecipes.mini import model as mini_model

TINY = {
    "vision": train.TrainConfig(3, 2, 0.005, 1e-3, checkpoint_every=2),
    "reading": train.TrainConfig(2, 2, 0.005, 1e-3, checkpoint_every=2),
    "align": train.TrainConfig(7, 2, 0.01, 1e-3, checkpoint_every=2),
    "joint": train.TrainConfig(2, 2, 0.005, 1e-3, checkpoint_every=2),
}
FIRST = {"vision": TINY["vision"]}
SEEDS = range(10_000)
RUN = """
import sys; sys.path[:0] = ["tests", "tests/mini"]
import torch; torch.set_num_threads(1)
from pathlib import Path
from test_vlm import TINY
from mmrecipes.mini import vlm
vlm.train_mini_vlm(Path(sys.argv[1]), Path(sys.argv[2]), TINY, device="cpu")
"""


@pytest.fixture(scope="module")
def tokenizer():
    return mini_model.make_tokenizer()


def test_pixels_are_what_the_processor_makes():
    processor, scene = mini_model.make_processor(), scenes.make_scene(5)
    made = processor.image_processor([scenes.render(scene)], return_tensors="np")["pixel_values"][0, 0]
    assert np.abs(made - labels.pixels(scene)).max() < 1e-6


def test_packed_questions_compute_what_each_computes_alone(tokenizer):
    model = mini_model.make_model(tokenizer, width=128, vision_layers=1, language_layers=2).eval()
    batch = mini_batches.ChatBatches(SEEDS[24:], 1, 1, tokenizer)[0]
    images, ids, answers, segments, _, kinds, *_ = batch
    seen = {}
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
    with torch.no_grad():
        losses.answer_loss(model, batch, torch.zeros(28, dtype=torch.long), align=0)
        hook.remove()
        at = 0
        for k in range(1, kinds.shape[1] + 1):
            own = (segments[0] == 0) | (segments[0] == k)
            alone = model.model(input_ids=ids[:, own], pixel_values=images[:, None]).last_hidden_state
            here = answers[0, own][1:] >= 0
            n = int(here.sum())
            assert torch.allclose(alone[0, :-1][here], seen["hidden"][at : at + n], atol=1e-4)
            at += n
    assert at == len(seen["hidden"]) and kinds.shape[1] == sum(mini_batches.MIX.values())


def test_a_packed_prompt_is_the_chat_templates(tokenizer):
    processor = mini_model.make_processor()
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a red star?"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    ids = processor(images=[scenes.render(scenes.make_scene(1))], text=[text])["input_ids"][0]
    packed = mini_batches.ChatBatches(SEEDS, 1, 1, tokenizer)
    assert ids == packed.prefix + packed.ids("Is there a red star?<end_of_utterance>\nAssistant:")


@pytest.mark.parametrize("seed", range(12))
def test_patch_labels_name_the_object_under_the_patch(seed):
    scene = scenes.make_scene(seed)
    found, centres = labels.patch_labels(scene)
    assert found.shape == (64, len(labels.PATCH_TARGETS))
    for t in scene.things:
        patch = int(t.y * mini_model.GRID) * mini_model.GRID + int(t.x * mini_model.GRID)
        row = dict(zip(labels.PATCH_TARGETS, found[patch], strict=True))
        assert row["there"] == 1 and row["colour"] == list(scenes.COLOURS).index(t.colour)
        assert row["shape"] == scenes.SHAPES.index(t.shape)
        code = [row[f"char{i}"] for i in range(3)]
        assert "".join(scenes.ALPHABET[c - 1] for c in code if c) == t.code
        assert centres[patch] == pytest.approx((t.x, t.y))


def test_points_and_marks_are_what_the_words_of_a_question_refer_to(tokenizer):
    batches = mini_batches.ChatBatches(SEEDS, 1, 12, tokenizer)
    batch, absent, several = batches[0], 0, 0
    for row, scene in enumerate(batches.draw(0)):
        for question in range(1, batch.kinds.shape[1] + 1):
            own = batch.segments[row] == question
            asked = own & (batch.answers[row] < 0)
            at = asked & (batch.points[row, :, 3] >= 0)
            text, points, marks = tokenizer.decode(batch.ids[row, asked]), batch.points[row, at], batch.marks[row, at]
            answer = tokenizer.decode(batch.answers[row, own & ~asked], skip_special_tokens=True).strip()
            things = sorted((t for t in scene.things if t.name in text), key=lambda t: text.find(t.name))
            family = families.FAMILIES[batch.kinds[row, question - 1]]
            if family in ("size", "reading", "relation", "exists"):
                assert torch.equal(points[:, 3], torch.ones(len(points))), text  # the colour, before the shape
                shown = points[:, 1] >= 0
                assert points[shown, 1:3].flatten().tolist() == pytest.approx([v for t in things for v in (t.x, t.y)]), text
                assert all((batch.centres[row, mark] == point[1:3]).all() for mark, point in zip(marks, points, strict=True))
                assert (marks.any(-1) == shown).all()
                assert points[:, 0].tolist() == ([float(answer == "yes")] if family == "exists" else [-1] * len(things))
                absent += answer == "no" and family == "exists"
            elif family == "count":
                assert len(points) == 1 and points[0, 0] == -2, text
                assert marks.sum() == int(answer), text
                several += int(answer) > 1
    assert absent > 3 and several > 3


@pytest.mark.parametrize(("index", "head"), [(0, 0), (1, 0), (2, -1), (3, 0)])
def test_the_supervised_attention_is_the_models_own(tokenizer, index, head):
    model = mini_model.make_model(tokenizer, vision_layers=1).eval()
    model.set_attn_implementation("eager")
    batch = mini_batches.ChatBatches(SEEDS[5:], 1, 1, tokenizer)[0]
    ids, segments = batch[1], batch[3]
    own = (segments[0] <= 1) & (segments[0] >= 0)  # the picture and its first question: one plain sequence
    with torch.no_grad():
        out = model(input_ids=ids[:, own], pixel_values=batch[0][:, None], output_attentions=True, output_hidden_states=True)
        last = int(own.sum()) - 1
        row, at, positions = torch.tensor([0, 0]), torch.tensor([last, 40]), torch.arange(last + 1)[None]
        mask = torch.ones(1, 1, last + 1, last + 1, dtype=torch.bool).tril()
        run = losses.LanguagePass(model.model.text_model, out.hidden_states, positions, mask)
        mine = losses.head_attention(run, index, head, row, at)
    assert torch.allclose(mine.exp(), out.attentions[index][0, head, at], atol=1e-5)


def test_the_tokenizer_round_trips_any_text_and_splits_codes(tokenizer):
    for text in ("the red circle labelled A7K", "Is it Größe 12 or 日本?\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("A7K") == ["A", "7", "K"]
    assert all(
        len(tokenizer(f" {w}")["input_ids"]) == 1 for w in (*scenes.COLOURS, *scenes.SHAPES, "small", "large", "yes", "no")
    )


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (60, 64)])
def test_muon_makes_updates_nearly_orthogonal(shape):
    before = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    before[0] *= 30  # one direction dominates
    after = torch.linalg.svdvals(train.orthogonalize(before))
    was = torch.linalg.svdvals(before)
    assert was.max() / was.median() > 10
    assert 0.6 < after.median() < 1.3 and after.max() < 1.4


def test_a_few_steps_learn(tokenizer):
    model = mini_model.make_model(tokenizer, width=128, vision_layers=1, language_layers=1)
    batches = mini_batches.ChatBatches(SEEDS, 12, 4, tokenizer)
    steppers, history = train.optimizers([model], 0.01, 2e-3), []
    for batch in (batches[i] for i in range(12)):
        loss, _ = losses.answer_loss(model, batch, batches.word_ids, 0.5)
        loss.backward()
        for s in steppers:
            s.step()
            s.zero_grad()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_a_killed_run_resumes_to_the_weights_of_one_never_killed(tmp_path):
    def start(name):
        return [sys.executable, "-c", RUN, str(tmp_path / name), str(tmp_path / f"work-{name}")]

    subprocess.run(start("whole"), check=True)
    process = subprocess.Popen(start("killed"))
    checkpoint = tmp_path / "work-killed" / "align" / "checkpoint" / "progress.json"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert process.returncode == -9, "the run was over before it could be killed"
    assert not (tmp_path / "killed").exists()
    subprocess.run(start("killed"), check=True)
    one, two = (models.load(tmp_path / n, dtype=torch.bfloat16).state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    steps = [(r["stage"], r["step"]) for r in json.loads((tmp_path / "killed" / "training.json").read_text())]
    assert len(steps) == len(set(steps)), "a resumed run must not log a step twice"


def test_a_foreign_directory_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        vlm.train_mini_vlm(tmp_path, tmp_path / "work", TINY)
    assert (tmp_path / "thesis.txt").read_text() == "years of work" and not (tmp_path / "work").exists()


def test_a_checkpoint_of_other_stages_or_a_damaged_one_is_refused_and_kept(tmp_path):
    work = tmp_path / "work"
    vlm.train_mini_vlm(tmp_path / "out", work, FIRST, device="cpu")
    weights = work / "vision" / "checkpoint" / "pytorch_model.bin"
    before = weights.read_bytes()
    with pytest.raises(UserError, match=r"is of another run .*steps=3"):
        vlm.train_mini_vlm(tmp_path / "out", work, {"vision": train.TrainConfig(4, 2, 0.005, 1e-3)}, device="cpu")
    with pytest.raises(UserError, match=r"is of another run .*vision of"):
        narrow = mini_model.make_model(mini_model.make_processor().tokenizer, width=128)
        vlm.train_mini_vlm(tmp_path / "out", work, FIRST, device="cpu", model=narrow)
    assert weights.read_bytes() == before
    weights.write_bytes(before[:1000])
    with pytest.raises(UserError, match="cannot be resumed"):
        vlm.train_mini_vlm(tmp_path / "out", work, FIRST, device="cpu")


def test_a_model_of_other_widths_is_trained_too(tmp_path, house_vlm):
    sizes = {"language": distill.StudentSize((0, 1, 2, 3), 64, 96), "vision": distill.StudentSize((0,), 96, 96)}
    small = distill.make_student(models.load(house_vlm), sizes, data.calibration(8), inherit=False)
    out = vlm.train_mini_vlm(tmp_path / "out", tmp_path / "work", TINY, device="cpu", model=small)
    assert models.load(out).config.text_config.hidden_size == 64
    assert {r["stage"] for r in json.loads((out / "training.json").read_text())} == set(TINY)


def test_a_model_of_another_kind_is_refused_before_any_work(tmp_path):
    for model in (tiny.llava(), tiny.house()):  # the second has one layer
        with pytest.raises(UserError, match="expected an Idefics3ForConditionalGeneration with four layers"):
            vlm.train_mini_vlm(tmp_path / "out", tmp_path / "work", TINY, model=model)
    assert not list(tmp_path.iterdir())


def test_the_supervised_heads_learn_to_look(tokenizer):
    model = mini_model.make_model(tokenizer, width=128, vision_layers=1, language_layers=4)
    batches, probes = mini_batches.ChatBatches(SEEDS, 1, 4, tokenizer), losses.Probes(128)
    steppers, history = train.optimizers([model, probes], 0.02, 3e-3), []
    for _ in range(40):
        loss, logs = losses.answer_loss(model, batches[0], batches.word_ids, 0.1, probes)
        loss.backward()
        for s in steppers:
            s.step()
            s.zero_grad()
        history.append(logs)
    for head in ("gathers", "relates", "first", "last", "spells"):
        assert history[-1][head] > 0.5 > 3 * history[0][head], (head, history[0][head], history[-1][head])
