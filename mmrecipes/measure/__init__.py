"""What a model weighs and how long it takes: bytes, peak memory, latency by stage, FLOPs and roofline."""

from mmrecipes.lazy import lazy_exports

_names = {"flops": "roofline stage_budget", "machine": "environment machine_peaks", "memory": "peak_memory"}
_names |= {"process": "peak_mb profile_exported time_generation", "size": "disk_bytes model_bytes parameters"}
_names |= {"timing": "STAGES cast clock latency wall"}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _names)
