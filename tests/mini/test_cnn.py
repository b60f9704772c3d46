"""The CNN: its targets, its training, and that the library alone can load it."""

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from mmrecipes import data, evaluate, models, train
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.mini import cnn, labels


@pytest.mark.parametrize("seed", range(6))
def test_cells_name_the_object_that_covers_them(seed):
    scene = scenes.make_scene(seed)
    classes = cnn.cells(labels.patch_labels(scene)[0])
    assert classes.shape == (8, 8) and classes.min() >= 0 and classes.max() < len(cnn.CLASSES)
    found = {cnn.CLASSES[c] for c in classes.flatten()} - {"nothing"}
    assert found <= {t.name for t in scene.things}
    for t in scene.things:
        assert cnn.CLASSES[classes[int(t.y * 8), int(t.x * 8)]] == t.name


def test_naming_is_scored_by_the_objects():
    drawn = [scenes.make_scene(s) for s in range(8)]

    def perfect(pixels):
        classes = torch.stack([torch.from_numpy(cnn.cells(labels.patch_labels(s)[0])) for s in drawn])
        return torch.nn.functional.one_hot(classes, len(cnn.CLASSES)).permute(0, 3, 1, 2).float()

    assert all(cnn.named(perfect, drawn)) and len(cnn.named(perfect, drawn)) == sum(len(s.things) for s in drawn)
    assert not any(cnn.named(lambda p: torch.zeros(len(p), 49, 8, 8), drawn))


def test_the_image_processor_makes_the_pixels_of_training():
    scene = scenes.make_scene(3)
    made = cnn.make_image_processor()(scenes.render(scene), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(made, torch.from_numpy(labels.pixels(scene)), atol=1e-5)


def test_the_committed_model_names_nearly_every_object():
    model = AutoModelForSemanticSegmentation.from_pretrained(models.data_dir() / "models" / "mini-cnn", dtype=torch.float32)
    drawn = [scenes.make_scene(s) for s in data.SPLITS["test"][:100]]
    right = cnn.named(lambda x: model.eval()(x).logits, drawn)
    assert evaluate.wilson(sum(right), len(right)).low > 0.95 and len(right) > 300
    files = [p.stat().st_size for p in (models.data_dir() / "models" / "mini-cnn").iterdir()]
    assert sum(files) < 6e6


def test_training_writes_a_model_that_the_library_loads_alone_and_that_learned_something(tmp_path):
    out = cnn.train_mini_cnn(tmp_path / "cnn", tmp_path / "work", train.TrainConfig(6, 4, 0.02, 0.004, device="cpu"))
    model, processor = AutoModelForSemanticSegmentation.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    inputs = processor(scenes.render(scenes.make_scene(1)), return_tensors="pt").to(model.dtype)
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, 49, 8, 8)
    assert model.config.id2label[1] == "red circle" or model.config.id2label[1] in cnn.CLASSES
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError):
        cnn.train_mini_cnn(tmp_path / "thesis", tmp_path / "work")


def test_a_training_cut_short_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    config = train.TrainConfig(6, 4, 0.02, 0.004, device="cpu", checkpoint_every=2)
    whole = cnn.train_mini_cnn(tmp_path / "whole", tmp_path / "work-whole", config)
    draw, calls = cnn.VisionBatches.__getitem__, []

    def interrupted(self, i):
        calls.append(i)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(self, i)

    monkeypatch.setattr(cnn.VisionBatches, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cnn.train_mini_cnn(tmp_path / "cut", tmp_path / "work", config)
    cut = cnn.train_mini_cnn(tmp_path / "cut", tmp_path / "work", config)
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5], "it goes on at its last checkpoint"
    one, two = (AutoModelForSemanticSegmentation.from_pretrained(path).state_dict() for path in (whole, cut))
    assert all(torch.equal(one[k], two[k]) for k in one)
