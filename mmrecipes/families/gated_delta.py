"""Gated DeltaNet, the linear attention of Qwen3.5's decoder: its forward as one graph for prompts and for single tokens.

A layer keeps two states of fixed size beside the KV caches of the others: the last inputs of its convolution, and what keys are
associated with which values. transformers has a loop over chunks for prompts and another formula for single tokens. `chunk` is
one formula for 1 to CHUNK tokens, without a loop that depends on how many: the runtime feeds a prompt in pieces of CHUNK.
"""

CHUNK = 64


def chunk(query, key, value, decay, beta, state):
    """Gated delta rule (Yang et al., 2024) for T <= CHUNK tokens: outputs (B, H, T, V) and the next state.

    query, key (B, H, T, K), query scaled; value (B, H, T, V); decay (B, H, T), logarithms, at most 0; beta (B, H, T);
    state (B, H, K, V). The same as, token by token: S = exp(decay) S; S += key (x) beta (value - key S); output = query S.
    """
    import torch

    at = torch.arange(query.shape[2], device=query.device)
    row, column, total = at[:, None], at[None, :], decay.cumsum(-1)
    between = torch.where(row >= column, total[..., :, None] - total[..., None, :], -torch.inf).exp()  # decay from column to row
    kept, keys = total.exp()[..., None], key.transpose(-1, -2)
    wanted = beta[..., None] * (value - kept * (key @ state))
    new = solve(beta[..., None] * (key @ keys) * between, wanted, row, column)
    out = kept * (query @ state) + (query @ keys * between) @ new
    rest = between[..., -1:, :]  # from each token to the last
    return out, state * kept[..., -1:, :] + (keys * rest) @ new


def solve(system, wanted, row, column):
    """x of (I + L) x = wanted (..., T, V), where L (..., T, T) is `system` below its diagonal, with zeros above it; T <= CHUNK.

    I + L is inverted in blocks of 2, 4, ..., CHUNK rows: [[A, 0], [C, B]] has the inverse [[A', 0], [-B' C A', B']]. As stable
    as substitution row by row. A product of powers of L is not: where keys are alike, powers grow beyond float32.
    """
    size, inside = 1, row == column
    inverse = inside.to(system.dtype)
    while size < CHUNK:
        size *= 2
        block = row // size == column // size
        inverse = inverse - inverse @ (system * (block & ~inside)) @ inverse
        inside = block
    return inverse @ wanted


def forward(module, hidden_states, cache_params, attention_mask=None, **_):
    """The forward of a Gated DeltaNet that has states; without padding."""
    import torch
    from torch.nn import functional
    from transformers.activations import ACT2FN

    cache, (batch, length, _) = cache_params.layers[module.layer_idx], hidden_states.shape
    mixed = torch.cat([cache.conv_states[0], module.in_proj_qkv(hidden_states).transpose(1, 2)], dim=-1)
    cache.conv_states[0] = mixed[..., -module.conv_kernel_size :]
    conv = module.conv1d
    mixed = ACT2FN[module.activation](functional.conv1d(mixed[..., 1:], conv.weight, conv.bias, groups=conv.groups))
    sizes = [module.key_dim, module.key_dim, module.value_dim]
    query, key, value = (
        x.reshape(batch, length, -1, width).transpose(1, 2)
        for x, width in zip(
            mixed.transpose(1, 2).split(sizes, dim=-1), (module.head_k_dim, module.head_k_dim, module.head_v_dim), strict=True
        )
    )
    query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    groups = module.num_v_heads // module.num_k_heads  # value heads that share a key
    query, key = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (query * module.head_k_dim**-0.5, key))
    decay = -module.A_log.exp() * functional.softplus(module.in_proj_a(hidden_states) + module.dt_bias)
    beta = module.in_proj_b(hidden_states).sigmoid()
    out, cache.recurrent_states[0] = chunk(
        query, key, value, decay.transpose(1, 2), beta.transpose(1, 2), cache.recurrent_states[0]
    )
    gate = module.in_proj_z(hidden_states).reshape(batch, length, -1, module.head_v_dim)
    return module.out_proj(module.norm(out.transpose(1, 2), gate).flatten(2))


FORWARDS = {"Qwen3_5GatedDeltaNet": forward}
