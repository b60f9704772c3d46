"""Does it still answer right? Accuracy, agreement, likelihood and retrieval, each with n and an interval."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "generation": "Result answer_logits answers divergence eos_token_ids score vqa",
        "retrieval": (
            "CHOICES Gallery POOL RetrievalResult embeddings gallery image_text_matching modality_gap retrieval_report "
            "retrieval_scores zero_shot"
        ),
        "statistics": "Paired Share agreement clustered paired questions_needed wilson",
    },
)
