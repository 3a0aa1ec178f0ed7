# SPDX-License-Identifier: Apache-2.0
"""The acceptance run says before its first step what a host lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import accept_gpu


def test_a_step_without_its_packages_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    step = accept_gpu.Step("some.py", needs=("math", "no_such_package"))
    monkeypatch.setitem(accept_gpu.STEPS, "some", step)
    assert accept_gpu.missing(["some", "decode"]) == {"some": ["no_such_package"]}


def test_commands_name_files_that_exist() -> None:
    root = Path(accept_gpu.ROOT)
    for name, step in accept_gpu.STEPS.items():
        words = [word for word in step.command.split() if word.endswith(".py")]
        assert all((root / word).is_file() for word in words), name
