"""One training loop, its optimizers, and LoRA. Chapters 0 and 3 (notebooks 02, 30 to 33)."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "hooks": "captured layer_pairs",
        "loop": "Loss LossModule RowBatches TrainConfig fit main_process mean_over_processes read_log shard",
        "lora": "PARTS add_lora add_tokens merge_lora train_lora",
        "optim": "Muon optimizers orthogonalize schedule",
    },
)
