"""Bad input: each is refused with one line that names the thing and the cure, and nothing is left half-written."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from mmrecipes import models
from mmrecipes.errors import UserError
from mmrecipes.mini import model as mini_model
from mmrecipes.models import saving


def refused(*mentions: object, call: Callable[[], object]) -> str:
    """Call, and check that it raises a UserError of one line in which all of `mentions` occur."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for mention in mentions:
        assert str(mention) in message
    return message


# ---- model directories


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return tiny.save(tiny.house(), tmp_path_factory.mktemp("intact") / "model")


@pytest.fixture
def path(intact, tmp_path) -> Path:
    """A copy of a good model, to be spoiled."""
    models.load(shutil.copytree(intact, tmp_path / "model"))
    return tmp_path / "model"


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_weights(path: Path, edit: Callable[[dict], object]) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def test_no_such_model(tmp_path):
    refused(tmp_path / "nothing", "hub id", call=lambda: models.load(tmp_path / "nothing"))
    refused("./nothing", "mini-vlm", call=lambda: models.load("./nothing"))
    refused("mini-vml", "mini-vlm", call=lambda: models.load("mini-vml"))


def test_house_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("MMRECIPES_DATA", str(tmp_path))
    refused(tmp_path, "MMRECIPES_DATA", call=models.data_dir)
    refused(tmp_path, "mmrecipes train mini-vlm", call=lambda: models.load("mini-vlm"))
    (tmp_path / "models").mkdir()
    refused(tmp_path, "mmrecipes train mini-vlm", call=lambda: models.load("mini-vlm"))


def test_revision_of_a_local_model(path):
    refused(path, "v2", "hub ids", call=lambda: models.load(path, revision="v2"))


def test_not_a_model_directory(tmp_path):
    file, empty, other = tmp_path / "file", tmp_path / "empty", tmp_path / "other"
    file.write_text("x")
    refused(file, "directory", call=lambda: models.load(file))
    empty.mkdir()
    refused(empty, "empty", call=lambda: models.load(empty))
    other.mkdir()
    (other / "adapter_config.json").write_text("{}")
    refused(other, "config.json", "adapter", call=lambda: models.load(other))


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "idef', "[1, 2]", "\x00\x01"])
def test_config_that_is_not_json(path, text):
    (path / "config.json").write_text(text)
    refused(path / "config.json", call=lambda: models.load(path))


def test_config_with_nonsense_in_it(path):
    vision = json.loads((path / "config.json").read_text())["vision_config"]
    edit_config(path, vision_config=vision | {"hidden_size": "wide"})
    refused(path, call=lambda: models.load(path))


def test_config_of_an_unknown_architecture(path):
    edit_config(path, model_type="idefics33")
    refused(path, "idefics33", "transformers", call=lambda: models.load(path))


def test_model_that_brings_its_own_code(path):
    marker = path.parent / "it ran"
    edit_config(path, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    refused(path, "own", "trust_remote_code=True", call=lambda: models.load(path))
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_not_a_vlm(kind, tmp_path):
    tiny.save(getattr(tiny, kind)(), tmp_path / kind)
    tiny.processor().save_pretrained(tmp_path / kind)
    refused(tmp_path / kind, kind, "not a vision-language model", call=lambda: models.load(tmp_path / kind))


def test_no_weights(path):
    weights = (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refused(path, "safetensors", "save_pretrained", call=lambda: models.load(path))
    weights.unlink()
    refused(path, "safetensors", "download", call=lambda: models.load(path))


@pytest.mark.parametrize("keep", [0, 5, 2000, 100_000, -1])
def test_truncated_weights(path, keep):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(file, "truncated", "again", call=lambda: models.load(path))


@pytest.mark.parametrize("start", [b"\xff" * 8, b"\x10" + b"\x00" * 7 + b"not json at all!", b"<html>404 not found</html>"])
def test_corrupted_header(path, start):
    file = path / "model.safetensors"
    file.write_bytes(start + file.read_bytes()[len(start) :])
    refused(file, "corrupted", call=lambda: models.load(path))


def test_header_with_wrong_fields(path):
    file = path / "model.safetensors"
    for tensor in ({"a": 1}, {"a": {"dtype": "F32"}}, {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}, {}, []):
        header = json.dumps(tensor).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00" * 4)
        refused(file, "corrupted", call=lambda: models.load(path))


def test_git_lfs_pointer(path):
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(path / "model.safetensors", "git lfs pull", call=lambda: models.load(path))


def test_shard_that_is_missing(tmp_path):
    model = tiny.house()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    model.processor.save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(shard, "missing", call=lambda: models.load(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path / "model.safetensors.index.json", call=lambda: models.load(tmp_path))


HEAD = "model.connector.modality_projection.proj.weight"


def test_weights_that_do_not_fit_the_config(path, capfd):
    edit_weights(path, lambda w: w.pop(HEAD))
    refused(path, "do not fit", "missing", HEAD, call=lambda: models.load(path))
    assert "LOAD REPORT" not in capfd.readouterr().err  # the library's own report, many lines
    edit_weights(path, lambda w: w.update({HEAD: torch.zeros(3, 3)}))
    refused(path, "do not fit", "mismatched", HEAD, call=lambda: models.load(path))


def test_weights_the_config_does_not_know(path):
    edit_weights(path, lambda w: w.update({"model.extra.weight": torch.zeros(3, 3)}))
    refused(path, "do not fit", "unexpected", "model.extra.weight", call=lambda: models.load(path))


def test_weights_that_are_not_finite(path):
    edit_weights(path, lambda w: w[HEAD].view(-1)[7:8].fill_(float("nan")))
    refused(path, "not finite", HEAD, call=lambda: models.load(path))


@pytest.mark.parametrize(
    ("lost", "mention"), [("tokenizer.json", "tokenizer.json"), ("processor_config.json", "processor_config.json")]
)
def test_processor_files_that_are_missing(path, lost, mention):
    (path / lost).unlink()
    refused(path, mention, "copy", call=lambda: models.load(path))


@pytest.mark.parametrize("broken", ["tokenizer.json", "processor_config.json"])
def test_processor_files_that_are_broken(path, broken):
    (path / broken).write_text('{"version": ')
    refused(path, "processor", "again", call=lambda: models.load(path))


def test_too_little_memory(path):
    free = models.free_memory()
    size = 2 * free // 4 * 4
    header = json.dumps({"huge": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (path / "model.safetensors").open("wb") as f:  # sparse: it takes no room on the disk
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + size)
    message = refused(path, "GB are needed in float32", "GB are free", "bfloat16", call=lambda: models.load(path))
    assert f"{1.2 * size / 1e9:.1f} GB" in message
    # in another precision the same file needs less, and the estimate says so
    half = refused(path, "bfloat16", call=lambda: models.load(path, dtype="bfloat16"))
    assert f"{0.6 * size / 1e9:.1f} GB" in half


def test_unknown_dtype_device_and_twin(path):
    for dtype in ("float33", "int8", torch.int8, 7):
        refused("dtype", dtype, "bfloat16", call=lambda d=dtype: models.load(path, dtype=d))
    for device in ("abacus", "cuda:99"):
        refused("device", device, "cpu", call=lambda d=device: models.load(path, device=d))
    refused("smolvlm-256b", "smolvlm-256m", call=lambda: mini_model.real_size("smolvlm-256b"))


# ---- where models are written


def test_places_where_no_model_is_written(tmp_path):
    model = tiny.house()
    file, busy, project, cloned = (tmp_path / n for n in ("file", "busy", "project", "cloned"))
    file.write_text("precious")
    for folder, name, text in (
        (busy, "thesis.txt", "precious"),
        (project, "config.json", '{"port": 80}'),  # a common name, and no model
        (cloned, "config.json", '{"model_type": "llava"}'),
    ):
        folder.mkdir()
        (folder / name).write_text(text)
    (cloned / ".git").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out in (file, busy, project, cloned, file / "below" / "it"):
        refused(out, "give a", call=lambda out=out: models.check_replaceable(out))
        refused(out, "give a", call=lambda out=out: models.save(model, model.processor, out))
    assert sorted(tmp_path.rglob("*")) == before
    assert (file.read_text(), (busy / "thesis.txt").read_text()) == ("precious", "precious")


def test_places_where_a_model_may_be_written(intact, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new", tmp_path / "new" / "deep", intact):
        models.check_replaceable(out)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]  # asking leaves nothing behind


class Interrupted(type(Path())):
    """A path whose move Ctrl-C cuts short."""

    def rename(self, target):
        raise KeyboardInterrupt


def test_an_older_model_outlives_an_interrupt_between_two_moves(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("older")
    with pytest.raises(KeyboardInterrupt):
        saving.take_place(Interrupted(tmp_path / "part"), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "weights"]


# ---- pictures


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\x00\x00\x00\x00IDAT"


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (12_000, 9_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_that_is_too_large(tmp_path, width, height):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(width, height))
    refused(bomb, "100 megapixels", "scale it down", call=lambda: models.load_image(bomb))


def test_pictures_that_are_none(tmp_path):
    text, nothing = tmp_path / "text.png", tmp_path / "nothing.jpg"
    text.write_text("This is not an image.")
    nothing.write_bytes(b"")
    refused(text, "not an image", "PNG", call=lambda: models.load_image(text))
    refused(nothing, "not an image", call=lambda: models.load_image(nothing))
    refused(tmp_path / "absent.png", "no such image", call=lambda: models.load_image(tmp_path / "absent.png"))
    refused(tmp_path, "directory", call=lambda: models.load_image(str(tmp_path)))


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp", "cut.gif", "cut.bmp", "cut.tif"])
@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_truncated_pictures(tmp_path, name, keep):
    whole = Image.effect_noise((64, 64), 80).convert("RGB")
    whole.save(tmp_path / name)
    assert models.load_image(tmp_path / name).size == (64, 64)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(keep * len(data))])
    refused(tmp_path / name, call=lambda: models.load_image(tmp_path / name))


def test_folders_without_good_pictures(tmp_path):
    refused(tmp_path / "absent", "no such folder", call=lambda: models.load_images(tmp_path / "absent"))
    refused(tmp_path, "no images", call=lambda: models.load_images(tmp_path))
    (tmp_path / "bad.png").write_text("This is not an image.")
    refused(tmp_path / "bad.png", "not an image", call=lambda: models.load_images(tmp_path))
    refused(tmp_path / "bad.png", "not a folder", call=lambda: models.load_images(tmp_path / "bad.png"))


# ---- questions to models that do not answer


def test_models_that_do_not_chat():
    picture = Image.new("RGB", (32, 32))
    refused("SiglipModel", "does not answer", call=lambda: models.ask(tiny.siglip(), picture, "What is it?"))
    mute = tiny.llava()
    mute.processor.chat_template = None
    refused("chat template", call=lambda: models.chat(mute, picture, "What is it?"))


# ---- prompts and tokenizers


def test_a_prompt_longer_than_the_context_is_refused(intact):
    model = models.load(intact)
    most = model.config.get_text_config().max_position_embeddings
    refused("tokens", most, "shorten", call=lambda: models.ask(model, Image.new("RGB", (64, 64)), "how " * most))


def test_a_truncating_tokenizer_truncates_nothing(path, intact):
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = (Image.new("RGB", (64, 64)), "How many objects are there, if the small ones count as well as the large ones?")
    whole, truncating = (models.load(p) for p in (intact, path))
    assert torch.equal(models.chat(truncating, *asked)["input_ids"], models.chat(whole, *asked)["input_ids"])
    assert models.ask(truncating, *asked) == models.ask(whole, *asked)
