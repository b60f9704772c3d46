"""LoRA: large matrices stay as they are, and two thin ones beside each learn (Hu et al. 2021, arXiv:2106.09685), by peft.

On plain, pruned and 4-bit models alike. Built by hand in notebook 33.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.errors import ParityError, UserError, require
from mmrecipes.models import modules
from mmrecipes.models.modules import clone
from mmrecipes.train.loop import TrainConfig, fit

PARTS = ("vision", "connector", "language")


@torch.no_grad()
def add_tokens(model: nn.Module, words: Mapping[str, Sequence[str]]) -> tuple[nn.Module, list[int]]:
    """A copy of `model`, processor included, in which each of `words` is one token, and their token ids.
    A new token begins as the mean of the tokens of other words: {"pink": ["red", "blue"]}. Raises UserError for no words, one
    that is one token already, or one without a list of others.
    """
    grown = copy.deepcopy(model)
    tokenizer = grown.processor.tokenizer

    def encode(*several: str) -> list[int]:
        return [t for word in several for t in tokenizer.encode(f" {word}", add_special_tokens=False)]

    begin = {word: [] if isinstance(others, str) else encode(*others) for word, others in words.items()}
    if not begin or not all(begin.values()) or min(len(encode(word)) for word in begin) < 2:
        raise UserError(f"add_tokens: {dict(words)}; give new words, each with a list of known ones")
    tokenizer.add_tokens([f" {word}" for word in begin])
    ids = [tokenizer.convert_tokens_to_ids(f" {word}") for word in begin]
    if max(ids) >= len(grown.get_input_embeddings().weight):
        grown.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for table in (grown.get_input_embeddings(), grown.get_output_embeddings()):
        for token, others in zip(ids, begin.values(), strict=True):
            table.weight[token] = table.weight[others].mean(0)
    return grown, ids


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float | None = None, parts: Sequence[str] = PARTS, token_ids: Sequence[int] = ()
):  # -> peft.PeftModel
    """A copy of `model` with an adapter of `rank` beside every linear layer of `parts`: these and `token_ids` alone learn.
    `token_ids`: those of `add_tokens`. `alpha` / rank (by default 2) scales what adapters add. `.get_base_model()` is the model
    with them inside, `.save_pretrained` writes them alone. UserError for a rank below 1, and parts and tokens it does not have.
    """
    require("peft", extra="train")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    base = _restore_layout(clone(model))
    if getattr(base, "is_loaded_in_4bit", False):  # norms and embeddings, stored in bf16, work in floats while adapters learn
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    own_parts, vocabulary = modules.parts(base), len(base.get_input_embeddings().weight)
    if any(not 0 <= token < vocabulary for token in token_ids):
        raise UserError(f"add_lora: tokens {list(token_ids)} of {vocabulary}; give those that add_tokens gave for this model")
    if rank < 1 or not parts or set(parts) - set(own_parts):
        given, known = ", ".join(parts) or "nothing", ", ".join(own_parts)
        raise UserError(f"add_lora: rank {rank} in {given}; expected 1 or more, in {known}")
    inside = {m for part in parts for m in own_parts[part].modules()}
    targets = [name for name, layer in modules.linears(base) if layer in inside]
    with warnings.catch_warnings():  # peft asks transformers for an attribute by the name it had before 5.0
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # one table, the embeddings, where the head is tied to them
        tables = {t.weight: t for t in (base.get_output_embeddings(), base.get_input_embeddings()) if t is not None}.values()
        rows = {n: list(token_ids) for n, m in base.named_modules() if token_ids and m in tables}
        config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=targets, trainable_token_indices=rows or None)
        adapted = get_peft_model(base, config)
    adapted.use_adamw = True  # adapters are thin: Muon's orthogonal updates are for whole matrices
    return adapted


def train_lora(model: nn.Module, batches: Any, config: TrainConfig, work: Path | None = None) -> nn.Module:
    """A model of `add_lora` with its adapters trained on right answers, in place; `config.adam_lr` is the rate.
    `batches` bring their own `answer_loss`, as `train.RowBatches` do. Resumable with `work`. UserError as `train.fit`.
    """
    device = _restore_layout(model.get_base_model()).device

    def loss(m: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        answers, _, logs = batches.answer_loss(m.get_base_model(), batch)
        return answers, logs | {"answers": answers.item()}

    return fit(model, batches, loss, replace(config, about="lora"), work).to(device)  # the training may move it to a GPU


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """A plain copy of the model with its adapters added to its matrices: no slower than it was, and zeros are zeros no more.
    4-bit matrices are taken back to float32, all else with them: rounded to 4 bits again, most of what was learned would be lost.
    Raises ParityError when the sum is not finite.
    """
    adapted = _restore_layout(clone(model))
    base = adapted.get_base_model()
    if getattr(base, "is_loaded_in_4bit", False):
        base.dequantize(torch.float32).float().is_loaded_in_4bit = False
        base._weight_conversions = None  # how its 4-bit files were read, and would be written
        for name, layer in [(n, m) for n, m in base.named_modules() if hasattr(m, "lora_A")]:
            layer.base_layer.weight += layer.get_delta_weight("default")  # peft's own merge would look for packed weights
            base.set_submodule(name, layer.base_layer)
    plain = adapted.merge_and_unload()
    for name, p in plain.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise ParityError(f"merge_lora: {name} is not finite; train with a lower rate")
    return plain.eval()


def _restore_layout(model: nn.Module) -> nn.Module:
    """`model` with its 4-bit weights as they were stored, in place."""
    # on CPUs with AVX512-BF16 bitsandbytes 0.50 turns them round when a model first answers, to a layout through which no
    # gradient passes and which peft merges wrongly; to ask for the state dict turns them back
    model.state_dict()
    return model
