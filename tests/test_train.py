"""Training: what a batch is, that the losses learn, and that a killed run resumes to the same weights."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mmrecipes import models, scenes, train
from mmrecipes.errors import UserError

TINY = (
    train.Stage("vision", 3, 2, 0.005, 1e-3),
    train.Stage("reading", 2, 2, 0.005, 1e-3),
    train.Stage("align", 7, 2, 0.01, 1e-3),
)
RUN = """
import sys; sys.path.insert(0, "tests")
import torch; torch.set_num_threads(1)
from pathlib import Path
from test_train import TINY
from mmrecipes import train
train.train_mini_vlm(Path(sys.argv[1]), Path(sys.argv[2]), TINY, device="cpu", progress=False, every=2)
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train.make_tokenizer()


def test_pixels_are_what_the_processor_makes():
    processor, scene = train.make_processor(), scenes.make_scene(5)
    made = processor.image_processor([scenes.render(scene)], return_tensors="np")["pixel_values"][0, 0]
    assert np.abs(made - train.pixels(scene)).max() < 1e-6


def test_packed_questions_compute_what_each_computes_alone(tokenizer):
    model = train.make_model(tokenizer, width=128, vision_layers=1, language_layers=2).eval()
    batch = train.ChatBatches(3, 4, 1, tokenizer)[0]
    images, ids, answers, segments, _, kinds, *_ = batch
    seen = {}
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
    with torch.no_grad():
        train.answer_loss(model, batch, torch.zeros(28, dtype=torch.long), align=0)
        hook.remove()
        at = 0
        for k in range(1, kinds.shape[1] + 1):
            own = (segments[0] == 0) | (segments[0] == k)
            alone = model.model(input_ids=ids[:, own], pixel_values=images[:, None]).last_hidden_state
            here = answers[0, own][1:] >= 0
            n = int(here.sum())
            assert torch.allclose(alone[0, :-1][here], seen["hidden"][at : at + n], atol=1e-4)
            at += n
    assert at == len(seen["hidden"]) and kinds.shape[1] == sum(train.MIX.values())


def test_a_packed_prompt_is_the_chat_templates(tokenizer):
    processor = train.make_processor()
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a red star?"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    ids = processor(images=[scenes.render(scenes.make_scene(1))], text=[text])["input_ids"][0]
    packed = train.ChatBatches(0, 1, 1, tokenizer)
    assert ids == packed.prefix + packed.ids("Is there a red star?<end_of_utterance>\nAssistant:")


@pytest.mark.parametrize("seed", range(12))
def test_patch_labels_name_the_object_under_the_patch(seed):
    scene = scenes.make_scene(seed)
    labels, centres = train.patch_labels(scene)
    assert labels.shape == (64, len(train.PATCH_TARGETS))
    for t in scene.things:
        patch = int(t.y * train.GRID) * train.GRID + int(t.x * train.GRID)
        row = dict(zip(train.PATCH_TARGETS, labels[patch], strict=True))
        assert row["there"] == 1 and row["colour"] == list(scenes.COLOURS).index(t.colour)
        assert row["shape"] == scenes.SHAPES.index(t.shape)
        code = [row[f"char{i}"] for i in range(3)]
        assert "".join(scenes.ALPHABET[c - 1] for c in code if c) == t.code
        assert centres[patch] == pytest.approx((t.x, t.y))


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
    model = train.make_model(tokenizer, width=128, vision_layers=1, language_layers=1)
    stage = train.Stage("align", 12, 4, 0.01, 2e-3)
    batches = train.ChatBatches(0, 12, 4, tokenizer)
    steppers, losses = train.optimizers([model], stage), []
    for batch in (batches[i] for i in range(12)):
        loss, _ = train.answer_loss(model, batch, batches.word_ids, 0.5)
        loss.backward()
        for s in steppers:
            s.step()
            s.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_killed_run_resumes_to_the_weights_of_one_never_killed(tmp_path):
    def start(name):
        return [sys.executable, "-c", RUN, str(tmp_path / name), str(tmp_path / f"work-{name}")]

    subprocess.run(start("whole"), check=True)
    process = subprocess.Popen(start("killed"))
    log = tmp_path / "work-killed" / "checkpoint.pt"
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if log.exists() and torch.load(log, weights_only=True)["stage"] == 2 and torch.load(log, weights_only=True)["step"] >= 2:
            process.kill()
        time.sleep(0.02)
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
        train.train_mini_vlm(tmp_path, tmp_path / "work", TINY)
    assert (tmp_path / "thesis.txt").read_text() == "years of work" and not (tmp_path / "work").exists()
