"""Fewer weights or tokens: zeros, smaller layers, dropped and merged visual tokens. Chapter 2 (notebooks 20 to 22)."""

from mmrecipes.lazy import lazy_exports

EXPORTS = {
    "cache_eviction": "kept_positions",
    "importance": "magnitude_importance similarity strongest taylor_importance",
    "layer_hooks": "",
    "slicing": "directions kept slice_language slice_vision",
    "sparsity": "global_shares magnitude magnitude_prune only round_rest smallest sparse_bytes sparsegpt sparsegpt_prune"
    " sparsity_of wanda wanda_prune zipped_bytes",
    "structured": "keep_channels_ keep_ffn_neurons keep_heads keep_hidden_channels keep_layers refit",
    "token_dropping": "",
    "token_merging": "",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, EXPORTS)
