"""Installs configs.yaml, which belongs to no package, next to args.py, which reads it: pyproject.toml cannot."""
from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = "configs.yaml"


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(CONFIGS, str(Path(self.build_lib, CONFIGS)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, CONFIGS))]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), CONFIGS]


setup(cmdclass={"build_py": BuildPy})
