"""What a model weighs and how long it takes: bytes, peak memory, latency by stage, FLOPs and roofline."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "exported": "peak_mb profile_exported",
        "flops": "BYTES roofline stage_budget",
        "machine": "CAPABILITIES commit environment machine_peaks",
        "memory": "last_line peak_memory",
        "size": "WEIGHT_FILES disk_bytes held_tensors model_bytes parameters",
        "timing": "STAGES cast clock interleaved latency timed walk_stages wall",
    },
)
