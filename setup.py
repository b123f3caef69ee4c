"""What pyproject.toml cannot say: a wheel carries the files that a checkout has beside the package (ted_scale/base/shipped.py)."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithExamples(build_py):
    def run(self) -> None:
        super().run()
        for folder in ("ds_configs", "launch/runs", "launch/plans") if not self.editable_mode else ():
            shutil.copytree(folder, Path(self.build_lib, "ted_scale", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithExamples})
