"""Puts the house models and the test split into the wheel, so that who has no repository has them too."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DATA = Path(__file__).parent / "data"


class BuildWithData(build_py):
    """`data/models/**` and `data/*.parquet` become `mmrecipes/_data/...`; an editable install uses `data/` itself."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in [*DATA.glob("*.parquet"), *DATA.glob("models/**/*")]:
            if source.is_file():
                target = Path(self.build_lib, "mmrecipes", "_data", source.relative_to(DATA))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithData})
