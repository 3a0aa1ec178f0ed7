# SPDX-License-Identifier: Apache-2.0
"""Our wheel as the build back end makes it where there is no compiler: its name and metadata."""

from __future__ import annotations

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from turbokv.integrations.build_identity import DISTRIBUTION
from turbokv.integrations.vllm import installed

ROOT = Path(__file__).parents[1]
BUILD = """
import sys
sys.path.insert(0, "")  # as backend-path says
import build_backend
print(build_backend.build_wheel(sys.argv[1], {"cuda": "off", "cpu": "off"}))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that the build leaves nothing in them."""
    pytest.importorskip("setuptools.command.bdist_wheel", reason="wanted setuptools 70.1 or newer")
    scratch = tmp_path_factory.mktemp("wheel")
    copy = scratch / "copy"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "turbokv", copy / "turbokv", ignore=ignore)
    files = ("pyproject.toml", "setup.py", "build_backend.py", "MANIFEST.in", "README.md")
    for name in (*files, "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-c", BUILD, str(scratch)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = scratch.glob("*.whl")
    return zipfile.ZipFile(path)


def info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_it_is_called_as_the_distribution_is(wheel: zipfile.ZipFile) -> None:
    message = HeaderParser().parsestr(info(wheel, "METADATA"))
    assert message["Name"] == DISTRIBUTION
    name, version, tags = Path(str(wheel.filename)).stem.split("-", 2)
    assert (name, version) == (DISTRIBUTION.replace("-", "_"), message["Version"])
    assert tags == "py3-none-any"


def test_nothing_that_it_requires_has_the_name_of_another_project(wheel: zipfile.ZipFile) -> None:
    message = HeaderParser().parsestr(info(wheel, "METADATA"))
    ours = [r for r in message.get_all("Requires-Dist") or [] if r.startswith("turbokv")]
    assert ours and all(r.startswith(f"{DISTRIBUTION}[") for r in ours)


def test_it_brings_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"turbokv"}


def test_it_brings_the_byte_format_and_the_types(wheel: zipfile.ZipFile) -> None:
    assert {"turbokv/FORMAT.md", "turbokv/py.typed"} <= set(wheel.namelist())


def test_it_brings_the_command(wheel: zipfile.ZipFile) -> None:
    points = configparser.ConfigParser()
    points.read_string(info(wheel, "entry_points.txt"))
    assert dict(points["console_scripts"]) == {"turbokv": "turbokv.cli:main"}


def test_it_brings_the_plugin_that_vllm_looks_for(wheel: zipfile.ZipFile) -> None:
    points = configparser.ConfigParser()
    points.read_string(info(wheel, "entry_points.txt"))
    (name, value), *others = points[installed.PLUGIN_GROUP].items()
    assert (name, others) == (installed.PLUGIN, [])
    module, _, function = value.partition(":")
    path = module.replace(".", "/")
    (source,) = {f"{path}.py", f"{path}/__init__.py"} & set(wheel.namelist())
    functions = [n for n in ast.parse(wheel.read(source)).body if isinstance(n, ast.FunctionDef)]
    assert function in [each.name for each in functions]
