"""Loading, saving, parts, the real-size twin, pictures and questions, on tiny random models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from mmrecipes import models
from mmrecipes.errors import UserError
from mmrecipes.mini import model as mini_model
from paths import ROOT

RED = Image.new("RGB", (160, 120), "red")
QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def house_dir(tmp_path_factory) -> Path:
    model = tiny.house()
    return models.save(model, model.processor, tmp_path_factory.mktemp("house") / "mini", dtype="float32")


def run(code: str, *args: str, **env: str) -> str:
    """Run `code` in a fresh interpreter, offline, and return what it printed."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MMRECIPES_"))} | {"HF_HUB_OFFLINE": "1"} | env
    done = subprocess.run([sys.executable, "-c", code, *args], env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- loading and saving


def test_loaded_model_is_the_saved_one(house_dir):
    model, original = models.load(house_dir), tiny.house()
    assert not model.training
    assert model.dtype == torch.float32
    inputs = models.chat(model, RED, QUESTION)
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, original(**inputs).logits)
    assert models.ask(model, RED, QUESTION) == models.ask(original, RED, QUESTION) != ""


def test_loads_and_answers_without_this_package(house_dir):
    code = """
import sys
sys.modules["mmrecipes"] = None  # blocked
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
path, question = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
content = [{"type": "image", "image": Image.new("RGB", (160, 120), "red")}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
new = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(new, skip_special_tokens=True).strip())
"""
    assert run(code, str(house_dir), QUESTION).rstrip("\n") == models.ask(tiny.house(), RED, QUESTION)


def test_save_casts_a_copy_and_says_so(tmp_path):
    model = tiny.house()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = models.save(model, model.processor, tmp_path / "out", extra={"training.json": "[]"})
    assert out == tmp_path / "out"
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert model.config.dtype != "bfloat16"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "training.json").read_text() == "[]"
    parameters = sum(p.numel() for p in model.parameters())
    assert 2 * parameters < (out / "model.safetensors").stat().st_size < 2.1 * parameters + 10_000
    loaded = models.load(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert models.load(out).dtype == torch.float32
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight.bfloat16(), rtol=0, atol=0)


def test_save_replaces_an_older_model_whole(house_dir, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(house_dir, out)
    (out / "stale.json").write_text("{}")
    (tmp_path / "out.old").mkdir()  # a user's backup, none of ours
    model = tiny.house(seed=1)
    models.save(model, model.processor, out, dtype="float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.old"]
    assert not (out / "stale.json").exists()
    assert torch.equal(models.load(out).lm_head.weight, model.lm_head.weight)


def test_save_over_the_directory_it_was_loaded_from(house_dir, tmp_path):
    out = shutil.copytree(house_dir, tmp_path / "out")
    model = models.load(out)
    answer = models.ask(model, RED, QUESTION)
    models.save(model, model.processor, out, dtype="float32")
    assert models.ask(model, RED, QUESTION) == answer == models.ask(models.load(out), RED, QUESTION)


def test_failed_save_leaves_everything_as_it_was(house_dir, tmp_path):
    out = shutil.copytree(house_dir, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    model = tiny.house(seed=1)
    with pytest.raises(UserError, match="could not be written"):
        models.save(model, model.processor, out, extra={"missing/notes.txt": "x"})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_house_models_are_found_by_name(house_dir, tmp_path, monkeypatch):
    shutil.copytree(house_dir, tmp_path / "models" / "mini-vlm")
    monkeypatch.setenv("MMRECIPES_DATA", str(tmp_path))
    assert models.data_dir() == tmp_path
    assert isinstance(models.ask(models.load("mini-vlm"), RED, QUESTION), str)


def test_installed_package_finds_its_own_data(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(ROOT / "mmrecipes", site / "mmrecipes", ignore=shutil.ignore_patterns("__pycache__", "_data"))
    (site / "mmrecipes" / "_data" / "models").mkdir(parents=True)
    (site / "data").mkdir()  # another package of that name
    code = "import sys; sys.path.insert(0, sys.argv[1]); from mmrecipes import models; print(models.data_dir())"
    assert run(code, str(site)).strip() == str((site / "mmrecipes" / "_data").resolve())


def test_hub_ids_offline_the_cached_loads_and_others_say_how_to_go_on(house_dir, tmp_path):
    repo = tmp_path / "hub" / "models--someone--small-vlm"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        shutil.copytree(house_dir, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    code = """
from mmrecipes import errors, models
for revision in (None, "v2"):
    print(models.load("someone/small-vlm", revision=revision).name_or_path)
for absent, revision in (("someone/other-vlm", None), ("someone/small-vlm", "v3")):
    try:
        models.load(absent, revision=revision)
    except errors.UserError as e:
        print(e)
"""
    first, second, absent, old = run(code, HF_HOME=str(tmp_path), PYTHONPATH=str(ROOT)).splitlines()
    assert (Path(first).name, Path(second).name) == ("a" * 40, "b" * 40)
    for cure in ("someone/other-vlm", "hf download someone/other-vlm", "--local-dir DIR", "HF_HUB_OFFLINE"):
        assert cure in absent
    assert "someone/small-vlm" in old and "HF_HUB_OFFLINE" in old


def test_dual_encoder_and_foreign_model_load(tmp_path):
    siglip = models.load(tiny.save(tiny.siglip(), tmp_path / "siglip"))
    inputs = siglip.processor(images=[RED], text=["a red circle"], return_tensors="pt")
    assert siglip(**{k: inputs[k] for k in ("pixel_values", "input_ids")}).logits_per_image.shape == (1, 1)
    llava = models.load(tiny.save(tiny.llava(), tmp_path / "llava"))
    assert models.ask(llava, RED, QUESTION) == models.ask(tiny.llava(), RED, QUESTION)


def test_sharded_weights_load(tmp_path):
    model = tiny.house()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    model.processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = models.load(tmp_path)
    assert all(torch.equal(p, dict(model.named_parameters())[k]) for k, p in loaded.named_parameters())


def _video_model(kind: str, out: Path) -> Path:
    """A model whose full processor wants torchvision for its video half, in the hub's format."""
    import transformers as t

    tokenizer = tiny.processor().tokenizer
    marks = ["image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end", "video"]
    special = {"image_token": "<image>"} | {f"{m}_token": "<global-img>" for m in marks if kind == "minicpm"}
    names = {f"{n}_token": getattr(tokenizer, f"{n}_token") for n in ("bos", "eos", "pad")}
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, extra_special_tokens=special, **names)
    if kind == "smolvlm":
        config = tiny.house().config.to_dict()
        config["vision_config"]["model_type"] = "smolvlm_vision"
        config = t.SmolVLMConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")})
        model = t.SmolVLMForConditionalGeneration(config)
        tile = {"longest_edge": mini_model.IMAGE_SIZE}
        images = t.SmolVLMImageProcessorPil(size=tile, max_image_size=tile)
    elif kind == "minicpm":
        model, images = tiny.minicpm(), t.MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=32, max_slice_nums=1)
    else:
        size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
        model, images = getattr(tiny, kind)(), t.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=size)
    for part in (model, images, tokenizer):
        part.save_pretrained(out)
    (out / "chat_template.jinja").write_text(mini_model.CHAT_TEMPLATE)
    if kind == "smolvlm":
        settings = {"image_seq_len": mini_model.VISUAL_TOKENS, "processor_class": "SmolVLMProcessor"}
        (out / "processor_config.json").write_text(json.dumps(settings))
    return out


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "minicpm", "smolvlm"])
def test_processor_does_without_its_video_half(kind, tmp_path):
    source = _video_model(kind, tmp_path / kind)
    model = models.load(source)
    answer = models.ask(model, RED, QUESTION)  # the library itself checks that image tokens and features agree in number
    image_id = model.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (models.chat(model, [RED, RED], QUESTION)["input_ids"] == image_id).sum() > 1
    out = models.save(model, model.processor, tmp_path / "again", dtype="float32")
    assert models.ask(models.load(out), RED, QUESTION) == answer
    for file in source.glob("*processor_config.json"):  # whoever has torchvision finds the video half's settings
        assert (out / file.name).read_text() == file.read_text()


def test_the_processor_is_the_one_that_its_files_name(tmp_path):
    """Pixtral has LLaVA's architecture and a processor of its own, which makes other tokens."""
    import transformers

    from mmrecipes.models import processors

    tiny.save(tiny.llava(), tmp_path / "model")
    assert processors._processor_class(tmp_path / "model") is transformers.LlavaProcessor
    file = tmp_path / "model" / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": "PixtralProcessor"}))
    assert (
        processors._processor_class(tmp_path / "model").__name__ == transformers.PixtralProcessor.__name__ == "PixtralProcessor"
    )


def test_free_memory_respects_the_container(tmp_path):
    machine = models.free_memory(cgroup=tmp_path)
    assert machine > 10**8
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 600\n")
    assert models.free_memory(cgroup=tmp_path) > 10**8
    (tmp_path / "memory.max").write_text("5000\n")
    assert models.free_memory(cgroup=tmp_path) == 5000 - 1000 + 600


# ---- parts

PARTS = {
    "idefics3": ("Idefics3VisionTransformer", "Idefics3Connector", "LlamaModel"),
    "idefics2": ("Idefics2VisionTransformer", "Idefics2Connector", "MistralModel"),
    "llava": ("CLIPVisionModel", "LlavaMultiModalProjector", "LlamaModel"),
    "qwen2_5_vl": ("Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLPatchMerger", "Qwen2_5_VLTextModel"),
    "qwen3_vl": ("Qwen3VLVisionModel", "Qwen3VLVisionPatchMerger", "Qwen3VLTextModel"),
    "minicpm": ("MiniCPMV4_6VisionModel", "MiniCPMV4_6Merger", "Qwen3_5TextModel"),
    "blip2": ("Blip2VisionModel", "Linear", "OPTForCausalLM"),
    "siglip": ("SiglipVisionModel", None, "SiglipTextModel"),
    "clip": ("CLIPVisionModel", None, "CLIPTextModel"),
}
OTHER = {
    "blip2": {"query_tokens"},
    "siglip": {"logit_scale", "logit_bias"},
    "clip": {"logit_scale", "visual_projection.weight", "text_projection.weight"},
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_each_architecture(kind):
    model = getattr(tiny, kind)()
    found = models.parts(model)
    vision, connector, language = PARTS[kind]
    assert type(found["vision"]).__name__ == vision
    assert type(found["language"]).__name__ == language
    if connector is None:
        assert set(found) == {"vision", "language"}
    else:
        assert type(found["connector"]).__name__ == connector
        assert found["head"] is model.get_output_embeddings()


@pytest.mark.parametrize("kind", PARTS)
def test_every_parameter_has_one_part(kind):
    model = getattr(tiny, kind)()
    part, found = models.part_of(model), models.parts(model)
    assert list(part) == [name for name, _ in model.named_parameters()]
    assert {name for name, p in part.items() if p == "other"} == OTHER.get(kind, set())
    name_of = {id(p): name for name, p in model.named_parameters()}
    inside = {key: {name_of[id(p)] for p in module.parameters()} for key, module in found.items()}
    assert all(part[name] == "connector" for name in inside.get("connector", ()))
    assert all(part[name] in ("vision", "connector") for name in inside["vision"])
    assert all(part[name] in ("language", "head") for name in inside["language"])


def test_connector_inside_the_tower_wins_and_tied_weights_count_once():
    qwen = models.part_of(tiny.qwen3_vl())
    mergers = {name for name in qwen if "merger" in name}
    assert any("deepstack" in name for name in mergers)
    assert {name for name, part in qwen.items() if part == "connector"} == mergers
    assert "head" not in models.part_of(tiny.house()).values()  # tied: counted with the embeddings
    assert models.part_of(tiny.llava())["lm_head.weight"] == "head"


@pytest.mark.parametrize("kind", ["house", "llava"])
def test_parts_run_in_order(kind):
    model, order = getattr(tiny, kind)(), []
    for name, module in models.parts(model).items():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    with torch.inference_mode():
        model(**models.chat(model, RED, QUESTION))
    assert order == ["vision", "connector", "language", "head"]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_text_models_have_no_parts(kind):
    with pytest.raises(UserError, match="not a vision-language model"):
        models.parts(getattr(tiny, kind)())


# ---- the real-size twin


def test_real_size_has_the_published_dimensions():
    model = mini_model.real_size(dtype="bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 256_484_928
    assert model.config.text_config.vocab_size == 49280
    assert not model.training
    inputs = models.chat(model, Image.new("RGB", (512, 512)), QUESTION)
    assert inputs["pixel_values"].shape == (1, 1, 3, 512, 512)
    assert inputs["pixel_values"].dtype == model.dtype == torch.bfloat16
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
    for name, p in model.named_parameters():
        if p.ndim > 1:
            sample = p.flatten()[:50_000].float()
            assert abs(sample.std().item() - 0.02) < 0.002, name
        else:
            assert torch.all(p == (0 if name.endswith("bias") else 1)), name
    frequencies = 100_000.0 ** -(torch.arange(0, 64, 2) / 64)  # non-persistent buffers survive the quick start
    torch.testing.assert_close(model.model.text_model.rotary_emb.inv_freq.float(), frequencies, rtol=0.01, atol=1e-6)


# ---- pictures and questions


def pixel(picture: Image.Image, xy: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert picture.mode == "RGB"
    return picture.getpixel(xy)


def test_pictures_of_every_kind_become_rgb(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    holes = palette.copy()
    holes.info["transparency"] = 1
    cases = {
        "alpha.png": (clear, (255, 255, 255)),  # nothing there: the white it is laid on
        "half.webp": (Image.new("RGBA", (4, 4), (0, 0, 0, 255)), (0, 0, 0)),
        "palette.png": (palette, (10, 200, 30)),
        "holes.png": (holes, (255, 255, 255)),
        "grey.png": (Image.new("L", (4, 4), 90), (90, 90, 90)),
        "bits.png": (Image.new("1", (4, 4), 1), (255, 255, 255)),
        "deep.png": (Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)), (128, 128, 128)),
        "float.tif": (Image.fromarray(np.array([[0.5, 1.0]], dtype=np.float32)), (128, 128, 128)),
        "frames.gif": (palette, (10, 200, 30)),
    }
    for name, (picture, want) in cases.items():
        picture.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert pixel(models.load_image(tmp_path / name)) == want, name
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, green, blue = pixel(models.load_image(tmp_path / "print.jpg"))
    assert red > 240 and green < 15 and blue < 15


def test_pictures_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (20, 10), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert models.load_image(tmp_path / "turned.jpg").size == (10, 20)


def test_image_takes_a_picture_and_leaves_it_alone():
    given = Image.new("RGB", (4, 4), "red")
    got = models.load_image(given)
    got.putpixel((0, 0), (0, 0, 0))
    assert pixel(given) == (255, 0, 0)


def test_images_are_sorted_and_only_pictures(tmp_path):
    for name in ("b.PNG", "a.jpg", "._a.jpg", "notes.txt"):
        RED.save(tmp_path / name, format="PNG")
    assert [(name, picture.size) for name, picture in models.load_images(tmp_path)] == [("a.jpg", RED.size), ("b.PNG", RED.size)]


def test_chat_takes_several_pictures_paths_and_dtypes(tmp_path):
    RED.save(tmp_path / "a.png")
    model = tiny.house().to(torch.bfloat16)
    inputs = models.chat(model, [tmp_path / "a.png", RED], QUESTION)
    assert inputs["pixel_values"].shape[:2] == (1, 2)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64
    text = model.processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.count("<global-img>") == 2
    assert text.endswith(f"{QUESTION}<end_of_utterance>\nAssistant:")


def test_ask_stops_at_the_end_of_an_answer():
    model = tiny.house()
    spoken = []
    model.register_forward_hook(lambda *_: spoken.append(1))
    models.ask(model, RED, QUESTION, max_new_tokens=3)
    assert len(spoken) <= 3
    with torch.no_grad():  # a model that always says: the end
        model.lm_head.weight.zero_()
        model.generation_config.suppress_tokens = [i for i in range(model.lm_head.out_features) if i != 1]
    assert model.processor.tokenizer.eos_token_id == 1
    assert models.ask(model, RED, QUESTION) == ""
