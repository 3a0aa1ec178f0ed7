# SPDX-License-Identifier: Apache-2.0
"""How the command line and the package are entered."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import turbokv
from turbokv import cli


def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "turbokv", "--version"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert out == f"turbokv {turbokv.__version__}\n"


def test_no_command_shows_what_there_is() -> None:
    shown = CliRunner().invoke(cli.app, []).output
    for name in ("demo", "eval", "calibrate", "plan", "serve", "doctor"):
        assert name in shown


def test_the_cache_is_imported_when_it_is_asked_for() -> None:
    pytest.importorskip("transformers")
    program = (
        "import sys, turbokv; assert 'transformers' not in sys.modules;"
        " from turbokv import TurboKVCache; print(TurboKVCache.__module__)"
    )
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert out.strip() == "turbokv.integrations.transformers.cache"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'TurboKVCaches'"):
        turbokv.TurboKVCaches  # noqa: B018


def test_types_are_published() -> None:
    assert importlib.resources.files(turbokv).joinpath("py.typed").is_file()
