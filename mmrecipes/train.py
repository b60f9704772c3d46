"""Trains the house model `mini-vlm` from nothing: one command, on two CPU cores or a GPU, resumable.

In stages, as the field does it (LLaVA, arXiv:2304.08485; SmolVLM, arXiv:2504.05299), told in notebook 02:
1. `vision`: the vision tower alone learns, patch by patch, what the scene's ground truth says is there; then `reading`:
   the same on pictures with several printed codes, the characters weighted up, since they come last;
2. `align`: connector and language model learn to answer, with the tower frozen;
   then `point`: the same, and below the last layer a name such as "red circle" must tell whether and where that object is,
   because yes-or-no answers alone stay at a coin's toss for long (not yet shown to help: see data/README.md);
3. `joint`: everything is unfrozen and trained together, at a small rate: at a large one the tower forgets.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes import scenes
from mmrecipes.errors import UserError
from mmrecipes.scenes import ALPHABET, COLOURS, FAMILIES, SHAPES, SIZES, Scene

IMAGE_SIZE, PATCH, SHUFFLE = 128, 16, 2
GRID = IMAGE_SIZE // PATCH  # patches a side
VISUAL_TOKENS = (GRID // SHUFFLE) ** 2
SPECIAL = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", "<pad>"]
CHAT_TEMPLATE = (  # SmolVLM's
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """One training stage. `lr` is for Muon (matrices); `adam_lr` for everything else."""

    name: str
    steps: int
    batch: int
    lr: float
    adam_lr: float


STAGES = (
    Stage("vision", 1400, 64, 0.005, 1.5e-3),
    Stage("reading", 600, 64, 0.004, 1e-3),
    Stage("align", 1700, 32, 0.006, 1.5e-3),
    Stage("point", 700, 32, 0.003, 1e-3),
    Stage("joint", 700, 32, 0.001, 3e-4),
)
DENSE = ("vision", "reading")  # the stages that train the tower alone
# How many of an image's training questions come from each family. The curriculum: first mostly what one look tells, then,
# from step LATE of `align` on, more of what needs several.
MIX = {"colour": 1, "shape": 1, "size": 1, "count": 2, "exists": 1, "relation": 4, "reading": 2}
LATE_MIX = MIX | {"exists": 3}
LATE = 800


# ---- the model: the library's own classes, real files


def make_tokenizer():  # -> transformers.PreTrainedTokenizerFast
    """A byte-level BPE trained on the world's text. Capitals and digits of printed codes stay single tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    code = pre_tokenizers.Split(Regex("[A-Z0-9](?![a-z])"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([code, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL + tiles,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(3000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[5],
        additional_special_tokens=SPECIAL[2:5] + tiles,
        padding_side="left",
        model_max_length=4096,
    )


def _text(n: int) -> Iterable[str]:
    words = " ".join((*COLOURS, *SHAPES, *SIZES, "yes no", *ALPHABET, *"0123456789"))
    for seed in range(n):
        scene = scenes.make_scene(seed)
        asked = (scenes.ask(scene, family, seed) for family in FAMILIES)
        yield from (f"User:{q.text}\nAssistant: {q.answer}" for q in asked if q)
        yield f"{scenes.caption(scene, full=True)} {words}"
        yield "\n".join(q.text for q in scenes.sort_of_clevr(seed)[1])


def make_processor():  # -> transformers.Idefics3Processor
    """The real Idefics3 processor for 128 px pictures; larger ones are split when `size` is raised."""
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    images = Idefics3ImageProcessorPil(
        size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=True
    )
    return Idefics3Processor(images, make_tokenizer(), image_seq_len=VISUAL_TOKENS, chat_template=CHAT_TEMPLATE)


def make_model(tokenizer, width: int = 256, vision_layers: int = 4, language_layers: int = 4, seed: int = 0):
    """A `mini-vlm` with random weights, float32, in training mode."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(seed)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": width // 64,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": language_layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 128,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():  # positions that attention can use from the first step (Beyer et al. 2022, arXiv:2205.01580)
        model.model.vision_model.embeddings.position_embedding.weight.copy_(sincos_positions(GRID, width))
    model.generation_config.update(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.train()


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D sine and cosine position vectors, (side * side, width), in row-major order, each entry in [-0.5, 0.5]."""
    frequency = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1) / 2  # (side, width / 2)
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return torch.cat([rows, columns], 1)


# ---- what the model trains on, made while it trains; step i is a pure function of i

PATCH_TARGETS = {  # name -> number of classes of each patch's labels; codes have a "none" class
    "there": 2,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    **{f"char{i}": len(ALPHABET) + 1 for i in range(3)},
    "near_colour": len(COLOURS),
    "near_shape": len(SHAPES),
}
_INDEX = {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES)}


def pixels(scene: Scene) -> np.ndarray:
    """The picture as the processor would hand it over: float32 (3, 128, 128) in [-1, 1]."""
    image = np.asarray(scenes.render(scene, IMAGE_SIZE), dtype=np.float32)
    return image.transpose(2, 0, 1) / 127.5 - 1


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Per patch, of the object that covers it most: class labels (64, 9), -100 where none, and its centre (64, 2)."""
    labels = np.full((GRID * GRID, len(PATCH_TARGETS)), -100)
    labels[:, 0] = 0
    centres = np.zeros((GRID * GRID, 2), dtype=np.float32)
    side = (np.arange(GRID) + 0.5) / GRID
    px, py = np.tile(side, GRID), np.repeat(side, GRID)
    best = np.zeros(GRID * GRID)  # how deep the patch reaches into the object, in fractions of the image
    for t in scene.things:
        dx = np.maximum(np.abs(px - t.x) - 0.5 / GRID, 0)
        dy = np.maximum(np.abs(py - t.y) - 0.5 / GRID, 0)
        depth = 0.8 * t.radius - np.hypot(dx, dy)
        here = depth > best
        best[here] = depth[here]
        near = scenes.closest(scene, t)
        chars = [ALPHABET.index(c) + 1 for c in t.code] + [0] * (3 - len(t.code))
        labels[here] = [
            1,
            *(_INDEX[k].index(getattr(t, k)) for k in _INDEX),
            *chars,
            _INDEX["colour"].index(near.colour) if near else -100,
            _INDEX["shape"].index(near.shape) if near else -100,
        ]
        centres[here] = (t.x, t.y)
    return labels, centres


class VisionBatches(torch.utils.data.Dataset):
    """Batch `i` of stage 1: pixels (B, 3, 128, 128), labels (B, 64, 9), centres (B, 64, 2).

    With `codes`, only pictures with at least so many printed codes.
    """

    def __init__(self, start: int, stop: int, batch: int, codes: int = 0):
        self.steps, self.batch, self.codes = range(start, stop), batch, codes

    def __len__(self) -> int:
        return len(self.steps)

    def _draw(self, step: int) -> list[Scene]:
        first = step * self.batch * (8 if self.codes else 1)  # room for the scenes that are passed over
        found = map(scenes.make_scene, itertools.count(first))
        return list(itertools.islice((s for s in found if sum(bool(t.code) for t in s.things) >= self.codes), self.batch))

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        if i >= len(self):
            raise IndexError(i)
        drawn = self._draw(self.steps[i])
        labels, centres = zip(*(patch_labels(s) for s in drawn), strict=True)
        return (
            torch.from_numpy(np.stack([pixels(s) for s in drawn])),
            torch.from_numpy(np.stack(labels)),
            torch.from_numpy(np.stack(centres)),
        )


class ChatBatches(VisionBatches):
    """Batch `i` of stages 2 and 3: one sequence an image, its picture followed by many independent questions.

    Every question sees the picture and itself, never the other questions (a block mask), and has the positions it will
    have when asked alone. So twelve questions cost one picture, and training looks like use.
    """

    def __init__(self, start: int, stop: int, batch: int, tokenizer, late: int | None = None):
        """Batches `start` to `stop`; from batch `late` on with LATE_MIX."""
        super().__init__(start, stop, batch)
        self.tokenizer, self.late = tokenizer, late
        image = "<image>" * VISUAL_TOKENS
        self.prefix = self.ids(f"<|im_start|>User:<fake_token_around_image><global-img>{image}<fake_token_around_image>")
        words = (*COLOURS, *SHAPES, *SIZES)
        self.word_ids = torch.tensor([self.ids(f" {w}")[0] for w in words] + [self.ids(c)[0] for c in ALPHABET])
        self.word_index = {w: i for i, w in enumerate((*words, *ALPHABET))}

    @functools.lru_cache(maxsize=200_000)  # noqa: B019  one dataset lives as long as its stage
    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        if i >= len(self):
            raise IndexError(i)
        drawn = self._draw(self.steps[i])
        mix = MIX if self.late is None or self.steps[i] < self.late else LATE_MIX
        families = [f for f, n in mix.items() for _ in range(n)]
        rows = [self._row(s, families) for s in drawn]
        longest = -(-max(len(r[0]) for r in rows) // 8) * 8
        ids, answers, segments, positions = (torch.zeros(self.batch, longest, dtype=torch.long) for _ in range(4))
        answers.fill_(-100)
        segments.fill_(-1)
        for k, row in enumerate(rows):
            for tensor, values in zip((ids, answers, segments, positions), row[:4], strict=True):
                tensor[k, : len(values)] = torch.tensor(values)
        kinds = torch.tensor([r[4] for r in rows])
        points = torch.stack([self._points(s, r) for s, r in zip(drawn, ids, strict=True)])
        words = torch.stack([self._words_in_cells(s) for s in drawn])
        images = torch.from_numpy(np.stack([pixels(s) for s in drawn]))
        return images, ids, answers, segments, positions, kinds, words, points

    def _row(self, scene: Scene, families: list[str]) -> tuple[list[int], ...]:
        ids, answers = list(self.prefix), [-100] * len(self.prefix)
        segments, positions, kinds = [0] * len(ids), list(range(len(ids))), []
        for n, family in enumerate(families):
            question = scenes.ask(scene, family, n) or scenes.ask(scene, "count", 100 + n)  # no printed code: count
            kinds.append(FAMILIES.index(question.family))
            prompt = self.ids(f"{question.text}<end_of_utterance>\nAssistant:")
            answer = self.ids(f" {question.answer}<end_of_utterance>")
            ids += prompt + answer
            answers += [-100] * len(prompt) + answer
            segments += [n + 1] * (len(prompt) + len(answer))
            positions += range(len(self.prefix), len(self.prefix) + len(prompt) + len(answer))
        return ids, answers, segments, positions, kinds

    def _points(self, scene: Scene, ids: Tensor) -> Tensor:
        """(T, 3): at the last token of each object's name whether it is there (1 or 0), and its centre; -1 elsewhere."""
        points = torch.full((len(ids), 3), -1.0)
        where = {t.name: (1.0, t.x, t.y) for t in scene.things}
        names = {i: w for w, i in zip(self.word_index, self.word_ids.tolist(), strict=True)}
        row = [names.get(i) for i in ids.tolist()]
        for at, (colour, shape) in enumerate(itertools.pairwise(row), start=1):
            if colour in COLOURS and shape in SHAPES:
                points[at] = torch.tensor(where.get(f"{colour} {shape}", (0.0, 0.0, 0.0)))
        return points

    def _words_in_cells(self, scene: Scene) -> Tensor:
        cells = torch.zeros(GRID // SHUFFLE, GRID // SHUFFLE, len(self.word_index))
        n = GRID // SHUFFLE
        for t in scene.things:
            marks = [self.word_index[w] for w in (t.colour, t.shape, t.size, *t.code)]
            cells[min(int(t.y * n), n - 1), min(int(t.x * n), n - 1), marks] = 1
        return cells.flatten(0, 1)


# ---- the three losses


class Probes(nn.Module):
    """Linear heads that are thrown away after training: what a patch shows (stage 1), where a named object is (stage 2)."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.Linear(width, sum(PATCH_TARGETS.values()))
        self.centre = nn.Linear(width, 2)
        self.point = nn.Linear(width, 3)

    def pointing(self, hidden: Tensor, points: Tensor) -> tuple[Tensor, dict[str, float]]:
        """hidden (B, T, D) from below the last layer of the language model, points (B, T, 3) -> loss, and how well it points."""
        named = points[..., 0] >= 0
        guess, want = self.point(F.layer_norm(hidden[named].float(), hidden.shape[-1:])), points[named]
        there = want[:, 0] == 1
        off = guess[there, 1:] - want[there, 1:]
        loss = F.binary_cross_entropy_with_logits(guess[:, 0], want[:, 0]) + 10 * off.pow(2).mean()
        right = (guess[:, 0] > 0) == there
        return loss, {"there": right.float().mean().item(), "off": off.abs().mean().item()}

    def patches(self, hidden: Tensor, labels: Tensor, centres: Tensor, char: float = 1.0) -> tuple[Tensor, dict[str, float]]:
        """hidden (B, 64, D), labels (B, 64, 9), centres (B, 64, 2) -> loss, and the accuracy of each target.

        `char` is the weight of the printed characters.
        """
        total, accuracy = torch.zeros((), device=hidden.device), {}
        for k, (name, logits) in enumerate(
            zip(PATCH_TARGETS, self.classes(hidden).split(list(PATCH_TARGETS.values()), -1), strict=True)
        ):
            want = labels[..., k].flatten()
            weight = {"near": 0.3, "char": char}.get(name[:4], 1.0)
            total = total + weight * F.cross_entropy(logits.flatten(0, 1).float(), want)
            right = (logits.flatten(0, 1).argmax(-1) == want)[want >= 0]
            accuracy[name] = right.float().mean().item()
        # reading is scored where there is something to read
        coded = (labels[..., 4] > 0).flatten()
        guess = self.classes(hidden).split(list(PATCH_TARGETS.values()), -1)[4].flatten(0, 1).argmax(-1)
        accuracy["read"] = (guess == labels[..., 4].flatten())[coded].float().mean().item()
        there = labels[..., 0] == 1
        off = (self.centre(hidden).float() - centres)[there]
        accuracy["off"] = off.abs().mean().item()
        return total + 10 * off.pow(2).mean(), accuracy


def answer_loss(
    model: nn.Module, batch: tuple[Tensor, ...], word_ids: Tensor, align: float, probes: Probes | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers' tokens -> loss, and the share of right answers per family.

    Plus `align` x the alignment of each visual token with the words in its cell; plus, with `probes`, the pointing loss.
    """
    images, ids, answers, segments, positions, kinds, words, points = batch
    core = model.model
    frozen = not next(core.vision_model.parameters()).requires_grad
    with torch.no_grad() if frozen else torch.enable_grad():
        seen = core.vision_model(images).last_hidden_state
    visual = core.connector(seen)
    embeds = core.get_input_embeddings()(ids)
    embeds = core.inputs_merger(ids, embeds, visual.flatten(0, 1))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    mask = (causal & (same | (segments == 0)[:, None, :]))[:, None]
    out = core.text_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=probes is not None,
    )
    hidden = out.last_hidden_state
    here = answers[:, 1:] >= 0  # the token before an answer's token predicts it
    logits, want = model.lm_head(hidden[:, :-1][here]), answers[:, 1:][here]
    loss = F.cross_entropy(logits.float(), want)
    logs = {"answer": loss.item(), **_family_accuracy(logits.argmax(-1) == want, here, segments[:, 1:], kinds)}
    if align:
        table = F.normalize(core.get_input_embeddings().weight[word_ids.to(ids.device)].float(), dim=-1)
        match = 12 * F.normalize(visual.float(), dim=-1) @ table.T - 3
        aligned = F.binary_cross_entropy_with_logits(match, words)
        logs["align"] = aligned.item()
        loss = loss + align * aligned
    if probes is not None:
        pointed, how = probes.pointing(out.hidden_states[-2], points)
        loss, logs = loss + pointed, logs | how
    return loss, logs


def _family_accuracy(right: Tensor, here: Tensor, segments: Tensor, kinds: Tensor) -> dict[str, float]:
    """Share of questions of each family with every answer token right. Batches are never seen twice: this is held-out."""
    row = torch.arange(len(here), device=here.device)[:, None].expand_as(here)
    question = (row * kinds.shape[1] + segments - 1)[here]
    whole = torch.ones(kinds.numel(), device=here.device)
    whole.scatter_reduce_(0, question, right.float(), "amin")
    return {f: whole[kinds.flatten() == i].mean().item() for i, f in enumerate(FAMILIES) if (kinds == i).any()}


# ---- the optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), for 2-D weights.

    `torch.optim.Muon` orthogonalizes in bfloat16, which a CPU without bf16 instructions runs 200 times slower;
    this one keeps the gradient's dtype there. The update is scaled to the size AdamW's would have (arXiv:2502.16982).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to `g` (m, n), roughly, by Newton-Schulz iteration."""
    x = g.bfloat16() if g.is_cuda else g
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).to(g.dtype)


def optimizers(modules: Iterable[nn.Module], stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the trainable matrices, AdamW for embeddings, biases, norms and convolutions."""
    matrices, rest, seen = [], [], set()
    for module in modules:
        for name, p in module.named_parameters():
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                is_matrix = p.ndim == 2 and not any(k in name for k in ("embed", "lm_head", "classes", "centre", "point"))
                (matrices if is_matrix else rest).append(p)
    return [Muon(matrices, lr=stage.lr), torch.optim.AdamW(rest, lr=stage.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine to 2%."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


# ---- the run: stages, checkpoints, log


@dataclass
class _Run:
    """What every stage of one run shares."""

    model: nn.Module
    probes: Probes
    tokenizer: object
    stages: tuple[Stage, ...]
    work: Path
    progress: bool
    every: int


def train_mini_vlm(
    out: Path,
    work: Path = Path("runs/mini-vlm"),
    stages: tuple[Stage, ...] = STAGES,
    device: str | None = None,
    progress: bool = True,
    every: int = 100,
) -> Path:
    """Train `mini-vlm` from nothing into directory `out`; a killed run goes on where its last checkpoint in `work` was.

    A checkpoint is written `every` so many steps. On a GPU the arithmetic is bf16 mixed precision; on a CPU float32, which
    trains faster there. Returns `out`. Raises UserError when `out` holds something that is not a model, before any work.
    """
    from mmrecipes import checks, models

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checks.check_replaceable(out)
    checks.check_replaceable(work / "new")  # the same question for checkpoints: may we write there?
    work.mkdir(parents=True, exist_ok=True)
    processor = make_processor()
    model = make_model(processor.tokenizer).to(device)
    probes = Probes(model.config.vision_config.hidden_size).to(device)
    run = _Run(model, probes, processor.tokenizer, stages, work, progress, every)
    state = _read_checkpoint(work, device)
    if state:
        model.load_state_dict(state["model"])
        probes.load_state_dict(state["probes"])
    at = (state["stage"], state["step"]) if state else (0, 0)
    seconds = _rewind_log(work / "log.jsonl", [s.name for s in stages], *at)
    for number in range(at[0], len(stages)):
        resumed = number == at[0] and at[1] > 0
        _run_stage(run, number, state["optimizers"] if resumed else None, at[1] if resumed else 0, seconds if resumed else 0)
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return models.save(model.eval(), processor, out, dtype=torch.bfloat16, extra={"training.json": json.dumps(log)})


def _run_stage(run: _Run, number: int, optimizer_states: list | None, begin: int, seconds: float) -> None:
    stage, model, probes, core = run.stages[number], run.model, run.probes, run.model.model
    device = next(model.parameters()).device
    core.vision_model.requires_grad_(stage.name not in ("align", "point"))
    trained = [core.vision_model if stage.name in DENSE else model, probes]
    first = sum(s.steps * s.batch for s in run.stages[:number]) // stage.batch + 1  # fresh seeds in every stage
    if stage.name in DENSE:
        codes = 2 if stage.name == "reading" else 0
        batches = VisionBatches(first + begin, first + stage.steps, stage.batch, codes)
    else:
        late = first + LATE if stage.name == "align" else first
        batches = ChatBatches(first + begin, first + stage.steps, stage.batch, run.tokenizer, late)
    steppers = optimizers(trained, stage)
    base = [[g["lr"] for g in s.param_groups] for s in steppers]
    for stepper, saved in zip(steppers, optimizer_states or [], strict=bool(optimizer_states)):
        stepper.load_state_dict(saved)
    workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers)
    started = time.perf_counter() - seconds
    for step, batch in enumerate(_bar(loader, f"{number + 1}/{len(run.stages)} {stage.name}", run.progress), start=begin):
        for stepper, lrs in zip(steppers, base, strict=True):
            for group, lr in zip(stepper.param_groups, lrs, strict=True):
                group["lr"] = lr * schedule(step, stage.steps)
        batch = [t.to(device, non_blocking=True) for t in batch]
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            if stage.name in DENSE:
                char = 3.0 if stage.name == "reading" else 1.0
                loss, logs = probes.patches(core.vision_model(batch[0]).last_hidden_state, *batch[1:], char=char)
            else:
                align, pointer = (0 if stage.name == "joint" else 0.5), (None if stage.name == "align" else probes)
                loss, logs = answer_loss(model, tuple(batch), batches.word_ids, align, pointer)
        if not torch.isfinite(loss):
            raise UserError(f"train: the loss of stage {stage.name}, step {step} is {loss.item()}; lower the stage's lr")
        loss.backward()
        nn.utils.clip_grad_norm_([p for m in trained for p in m.parameters() if p.grad is not None], 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        if step % 10 == 0 or step + 1 == stage.steps:
            row = {"stage": stage.name, "step": step, "seconds": round(time.perf_counter() - started, 1), "loss": loss.item()}
            with (run.work / "log.jsonl").open("a") as f:
                f.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in (row | logs).items()}) + "\n")
        if (step + 1) % run.every == 0 and step + 1 < stage.steps:
            _write_checkpoint(run, number, step + 1, steppers)
    _write_checkpoint(run, number + 1, 0, [])


def _rewind_log(path: Path, names: list[str], stage: int, step: int) -> float:
    """Drop what was logged after the checkpoint, so that no step is logged twice; the seconds its stage had taken by then."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [r for r in rows if (names.index(r["stage"]), r["step"]) < (stage, step)]
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(aside, path)
    return max((r["seconds"] for r in kept if names.index(r["stage"]) == stage), default=0.0)


def _bar(loader: Iterable, text: str, progress: bool) -> Iterable:
    if not progress:
        return loader
    from rich.progress import track

    return track(loader, text)


def _write_checkpoint(run: _Run, stage: int, step: int, steppers: list[torch.optim.Optimizer]) -> None:
    state = {"stage": stage, "step": step, "model": run.model.state_dict(), "probes": run.probes.state_dict()}
    torch.save(state | {"optimizers": [s.state_dict() for s in steppers]}, run.work / "checkpoint.pt.part")
    os.replace(run.work / "checkpoint.pt.part", run.work / "checkpoint.pt")


def _read_checkpoint(work: Path, device: str) -> dict | None:
    path = work / "checkpoint.pt"
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None
