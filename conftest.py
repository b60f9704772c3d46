"""What every pytest run here needs, of the tests and of the notebooks: `pytest tests`, `pytest --nbval notebooks`.

Property tests draw the same examples every time (profile `ci`), so that a failure is the change's and not the day's.
`make fuzz` draws new ones, and many (`--hypothesis-profile=random`, or the environment variable HYPOTHESIS_PROFILE).
"""

import gc
import os

ENVIRONMENT = {  # set before anything imports huggingface_hub; the kernels of notebooks inherit it
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(ENVIRONMENT)
os.environ.pop("MODEL", None)  # the recipes read it; the notebooks set it

from hypothesis import settings  # noqa: E402

settings.register_profile("ci", derandomize=True, max_examples=40, deadline=None)
settings.register_profile("random", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Python looks for cycles among all objects, of which a test process of an hour holds millions: a tenth of its time
gc.set_threshold(20_000, 10, 10)


def pytest_collection_finish() -> None:
    """What was imported stays: nothing of it needs to be looked through again."""
    gc.collect()
    gc.freeze()
