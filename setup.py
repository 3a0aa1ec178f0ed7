# SPDX-License-Identifier: Apache-2.0
"""The commands that put the CUDA kernels into a wheel; all else is in pyproject.toml."""

from setuptools import setup

from build_backend import BdistWheel, BuildPy, KernelDistribution

setup(cmdclass={"bdist_wheel": BdistWheel, "build_py": BuildPy}, distclass=KernelDistribution)
