"""Fewer bits: rounding, GPTQ and AWQ, static int8, mixed precision, NF4, QAT. Chapter 1 (notebooks 10 to 17)."""

from mmrecipes.lazy import lazy_exports

EXPORTS = {
    "calibration": "calibrate input_hessians",
    "gptq": "awq_round column_sweep gptq_round output_error round_columns",
    "groups": "GROUP best_scale fake_quantize group_scales grouped on_grid pack",
    "kv_cache": "Quantized QuantizedLayer quantize_cache quantized_cache",
    "mixed_precision": "Cost apply_plan bits_by_module gptq_rounding greedy knapsack plan_bytes sensitivity units",
    "nf4": "can_nf4 load_nf4 nf4_bytes nf4_rounded write_nf4",
    "observers": "Histogram OBSERVERS entropy fake_quantize_range histogram minmax mse percentile qparams",
    "qat": "PARTS FakeQuantizer convert_qat_ fake_quantize_ste prepare_qat_",
    "rounding": "bf16 dynamic_int8 packed_bytes packed_weight_bytes round_to_nearest search_round simulate simulate_dynamic_int8",
    "static": "SingleOutput fold_batch_norms histograms pt2e ranges saturates simulate_static vision_output",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, EXPORTS)
