"""Models in, checked before anything large happens: each refusal is one line that names the thing and the cure."""

import os
import re
from pathlib import Path

import torch
from torch import nn

from mmrecipes import quiet
from mmrecipes.errors import UserError, one_line
from mmrecipes.models.modules import parts
from mmrecipes.models.preflight import check_memory, read_json, weight_bytes
from mmrecipes.models.processors import load_processor

HOUSE = ("mini-vlm", "mini-siglip", "mini-resampler")  # the models that come with this package, in data_dir()/models
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
HUB_CONFIGS = [pattern for pattern in HUB_FILES if "safetensors" not in pattern]


def data_dir() -> Path:
    """Where the house models and the test split are: `MMRECIPES_DATA`, the repository's data/, or the installed wheel's copy.
    >>> (data_dir() / "models" / "mini-vlm" / "config.json").is_file()
    True
    """
    here = Path(__file__).resolve().parents[1]
    given = os.environ.get("MMRECIPES_DATA")
    for path in [Path(given)] if given else [here.parent / "data", here / "_data"]:
        # a name as common as data/ may be somebody else's: ours holds models or the test split
        if (path / "models").is_dir() or any(path.glob("*test*.parquet")):
            return path
    where = f"MMRECIPES_DATA={given}" if given else "the repository's data/ or the installed package"
    raise UserError(f"no house models in {where}: set MMRECIPES_DATA to a data directory, or run `mmrecipes train mini-vlm`")


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """The Hugging Face model itself, in eval mode, with `processor`, and `saved_dtype`, which config.json names, as attributes.
    `name` is a house model (see HOUSE), a local directory or a hub id; `revision` is for hub ids; `dtype` "auto" takes
    the one the weights were saved in. Code from a directory that is not a house model's runs only with `trust_remote_code`.
    Weights come from safetensors files, which cannot run code. Raises UserError for anything missing, broken, misfitting, not
    multimodal, or too large for the memory that is free.
    >>> load("mini-vlm", dtype="bfloat16").dtype
    torch.bfloat16
    """
    dtype = as_dtype(dtype)
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as e:  # torch built without it, no such device, no such word
        raise UserError(f"device {str(device)!r} cannot be used here ({one_line(e, 80)}): use cpu") from e
    path = _directory(name, revision)
    trust_remote_code |= os.fspath(name) in HOUSE  # mini-resampler's is this package's own
    config = read_json(path / "config.json")
    auto = _auto_class(path, config, trust_remote_code)
    check_memory(name, weight_bytes(path, None if dtype == "auto" else dtype), dtype, device)
    with quiet.library_logs():  # warnings about SigLIP's own token ids, and many lines on misfits, which are refused below
        processor = load_processor(path, trust_remote_code)
        options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
        try:
            model, info = auto.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        except Exception as e:  # whatever a broken directory makes the library raise
            raise UserError(f"{path}: cannot be loaded ({one_line(e)}); check config.json, or get a complete copy") from e
    # from_pretrained only warns about these, and fills the gaps with random numbers
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            first = min(k if isinstance(k, str) else k[0] for k in info[kind])
            what = f"{len(info[kind])} {kind.removesuffix('_keys')}, such as {first}"
            raise UserError(f"{path}: the weights do not fit config.json ({what}); get the config.json that belongs to them")
    for key, p in model.named_parameters():
        if p.is_floating_point() and p.element_size() > 1 and not torch.isfinite(p.sum(dtype=torch.float32)):
            raise UserError(f"{path}: the weights are damaged ({key} is not finite); get a fresh copy")
    parts(model)  # refuses what is not multimodal
    model.processor, model.saved_dtype = processor, config.get("dtype", config.get("torch_dtype"))
    return model.to(device).eval()


def skeleton(name: str | Path, trust_remote_code: bool = False) -> nn.Module:
    """The model that config.json describes, in float32 on the meta device: shapes without weights, of which no file is needed.
    `name` as for `load`; its directory is `.name_or_path`. Raises UserError for what is missing, unknown or not multimodal.
    """
    from transformers import AutoConfig

    path = _directory(name, None, HUB_CONFIGS)
    trust_remote_code |= os.fspath(name) in HOUSE
    auto = _auto_class(path, read_json(path / "config.json"), trust_remote_code)
    try:
        with quiet.library_logs(), torch.device("meta"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as e:  # whatever a broken config makes the library raise
        cure = "install that package" if isinstance(e, ImportError) else "get a fresh copy"
        raise UserError(f"{path}: no model can be built from config.json ({one_line(e)}); {cure}") from e
    parts(model)
    return model.eval()


def as_dtype(given: torch.dtype | str) -> torch.dtype | str:
    """A floating dtype from its name, also "fp32", "bf16" or "fp16"; "auto" stays. UserError for any other."""
    if given == "auto":
        return "auto"
    found = given if isinstance(given, torch.dtype) else getattr(torch, DTYPES.get(given, str(given)), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"unknown dtype {given!r}: use float32, bfloat16, float16 or auto")
    return found


def _directory(name: str | Path, revision: str | None, files: list[str] = HUB_FILES) -> Path:
    text, path = os.fspath(name), Path(name).expanduser()
    if text in HOUSE:
        path = data_dir() / "models" / text
        if not path.is_dir():
            raise UserError(f"{text}: not in {path.parent}; run `mmrecipes train {text}`, or set MMRECIPES_DATA")
    elif not path.exists() and isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        path, revision = _from_hub(text, revision, files), None
    elif not path.exists():
        raise UserError(f"no model at {text!r}: give {' or '.join(HOUSE)}, a directory or a hub id (owner/name)")
    if revision:
        raise UserError(f"{text}: revision {revision!r} is for hub ids, and this model is local: leave it out")
    if not path.is_dir():
        raise UserError(f"{path}: not a directory; give the directory that holds config.json and *.safetensors")
    if not any(path.iterdir()):
        raise UserError(f"{path}: the directory is empty; download or copy the model into it again")
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").exists()
        cure = "it is a LoRA adapter: merge it into its base model first" if adapter else "give the one that holds it"
        raise UserError(f"{path}: no config.json, so not a model directory; {cure}")
    return path


def _from_hub(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = {"allow_patterns": files, "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except errors.GatedRepoError as e:
        raise UserError(f"{name}: accept its terms on its hub page, then `hf auth login`") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"{name}: no such directory here, and no such model on the hub (if private: `hf auth login`)") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"{name}: the hub has no revision {revision!r} of it; leave revision out for the newest") from e
    except Exception as e:  # offline by choice or by accident: requests, httpx and the hub each have their own errors for it
        how = f"run `hf download {name} --local-dir DIR` on a connected machine and pass DIR, or unset HF_HUB_OFFLINE"
        raise UserError(f"{name}: no such directory here, and the hub cannot be reached: {how}") from e


def _auto_class(path: Path, config: dict, trust_remote_code: bool):
    """The Auto class that loads it; UserError where config.json names no multimodal model, or one that brings its own code."""
    import transformers
    from transformers.models.auto import modeling_auto as known
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, own_code = config.get("model_type"), config.get("auto_map") or {}
    if kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    if kind in known.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES:  # CLIP, SigLIP and kin
        return transformers.AutoModel
    if kind in CONFIG_MAPPING_NAMES:
        raise UserError(f"{path}: {kind} is not a vision-language model; give one that takes images and text")
    if not own_code:
        at = f"transformers {transformers.__version__}"
        raise UserError(f"{path}: {at} does not know the architecture {kind!r}; upgrade transformers, or correct config.json")
    if not trust_remote_code:
        raise UserError(f"{path}: {kind!r} needs code from its own directory; read it, then pass trust_remote_code=True")
    names = ("AutoModelForImageTextToText", "AutoModelForCausalLM")
    return getattr(transformers, next((n for n in names if n in own_code), "AutoModel"))
