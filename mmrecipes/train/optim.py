"""The optimizers: Muon for matrices, AdamW for the rest, and the schedule of their rates."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), scaled as in arXiv:2502.16982; for matrices, and convolutions as such.
    `torch.optim.Muon` works in bfloat16, 200 times slower on a CPU without bf16 instructions: there this keeps the dtype.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # in the signature because accelerate passes it
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-group["lr"] * 0.2 * math.sqrt(max(update.shape)))


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


def optimizers(modules: Iterable[nn.Module], lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the trainable matrices, those of convolutions included; AdamW for biases, norms, depthwise convolutions,
    embeddings (of tokens, positions, patches), the language model's head, and modules with an attribute `use_adamw`."""
    both, kept = nn.ModuleList(modules), set()
    for name, m in both.named_modules():
        patches = isinstance(m, nn.Conv2d) and m.in_channels <= 4 and m.kernel_size == m.stride != (1, 1)
        if patches or isinstance(m, nn.Embedding) or name.endswith(".lm_head") or getattr(m, "use_adamw", False):
            kept |= set(m.parameters())
    matrices, rest = [], []
    for p in both.parameters():
        is_matrix = p.ndim == 2 or (p.ndim == 4 and p.shape[1] > 1)
        if p.requires_grad:
            (matrices if is_matrix and p not in kept else rest).append(p)
    muon = [Muon(matrices, lr=lr)] if matrices else []
    return muon + ([torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)] if rest else [])


def schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine to 2%."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
