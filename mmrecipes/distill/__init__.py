"""A student learns from its teacher: from logits, features, embeddings or a swapped encoder. Chapter 3 (notebooks 30 to 32)."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "contrastive": "CONTRAST_ONLY ContrastiveWeights contrastive_loss distill_dual set_trainable",
        "encoder_swap": "ENCODERS align_connector fold_map_ least_squares_map match_features swap_vision_encoder",
        "kd": "LABELS_ONLY LossWeights StudentWithProjections distill distillation_loss match_vision_encoder qat recover",
        "losses": "RELATION_HEADS affinity_loss embed embedding_loss feature_loss interactive_loss kl_loss pair_loss"
        " relation_loss ridge siglip_loss",
        "students": "PROJECTION SLICE StudentSize make_dual_student make_student",
        "encoders": "",
    },
)
