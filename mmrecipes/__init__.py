"""mmrecipes: recipes that make multimodal models small and fast, measured in front of you.

`mmr.load`, `mmr.ask` and `mmr.compare` are what a notebook starts with; the subpackages hold the rest, from the core (`models`,
`data`, `evaluate`, `measure`) over techniques (`quantize`, `prune`, `train`, `distill`) and deployment (`export`, `inference`)
to applications (`report`, `shrink`) and the models of the book (`mini`). Each imports only those before it.
"""

import logging
import sys

from mmrecipes.lazy import lazy_exports

__version__ = "0.1.0"
_whole = ("data", "distill", "errors", "evaluate", "export", "measure", "mini", "prune", "quantize", "quiet", "shrink", "train")
_lent = {"models": "load ask", "inference": "load_exported", "report": "compare"}
__getattr__, __dir__, __all__ = lazy_exports(__name__, dict.fromkeys(_whole, "") | _lent)

# torchao, which transformers imports, warns of every CUDA library that a machine lacks: noise wherever the job is a CPU's
for _name in ("torchao", "torch.utils._pytree"):
    if not logging.getLogger(_name).level:
        logging.getLogger(_name).setLevel(logging.ERROR)

# OpenVINO and NNCF tell Intel of each import and conversion where this package is there: nothing shall leave the machine
sys.modules.setdefault("openvino_telemetry", None)
