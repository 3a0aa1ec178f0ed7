# SPDX-License-Identifier: Apache-2.0
"""The environment of ``make serve``: what it refuses, and what it installs when."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import serving_environment as serving

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("vllm", "python", "fits"),
    [
        ("0.33.0", (3, 10), False),
        ("0.33.0", (3, 11), True),
        ("0.33.0", (3, 13), True),
        ("0.33.0", (3, 14), False),
        ("0.32.0", (3, 10), False),
        ("0.31.0", (3, 10), True),
        ("0.28.0", (3, 9), False),
    ],
)
def test_a_python_that_vllm_does_not_take_is_refused(
    vllm: str, python: tuple[int, int], fits: bool
) -> None:
    if fits:
        serving.check_python(vllm, python)
        return
    got = ".".join(map(str, python))
    with pytest.raises(ValueError, match=rf"for vLLM {vllm}, got {got}; .*PYTHON=python3.12"):
        serving.check_python(vllm, python)


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vllm: wanted a release such as 0\.33\.0, got 'newest'"):
        serving.check_python("newest", (3, 12))


@pytest.mark.parametrize("names", [[], ["turbokv_cache-1-py3-none-any.whl"] * 2])
def test_not_one_wheel_is_refused(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "turbokv-0.1.0-py3-none-any.whl").touch()  # of another project, or before the name
    for index, name in enumerate(names):
        (tmp_path / name.replace("-1-", f"-{index}-")).touch()
    with pytest.raises(ValueError, match=r"wanted one turbokv_cache-\*\.whl in .*make wheel"):
        serving.find_wheel(tmp_path)


def test_only_what_changed_is_installed(tmp_path: Path) -> None:
    commands: list[list[str]] = []
    folder, wheel = tmp_path / "env", tmp_path / "turbokv_cache-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"first")

    def run(command: Sequence[str]) -> None:
        commands.append(list(command))
        if command[1:3] == ["-m", "venv"]:
            (folder / "bin").mkdir(parents=True)
            (folder / "bin" / "python").touch()

    def prepare(vllm: str = "0.33.0") -> list[list[str]]:
        commands.clear()
        serving.prepare(folder, vllm, wheel, run)
        return list(commands)

    assert [c[-2:] for c in prepare()] == [["venv", str(folder)], ["vllm==0.33.0", str(wheel)]]
    assert prepare() == []
    wheel.write_bytes(b"second, with the same version")
    assert [c[-2:] for c in prepare()] == [
        ["vllm==0.33.0", str(wheel)],
        ["--no-deps", str(wheel)],
    ]
    assert prepare() == []
    assert prepare("0.32.0")[0][-2] == "vllm==0.32.0"


def test_an_installation_that_failed_is_taken_up_again(tmp_path: Path) -> None:
    wheel = tmp_path / "turbokv_cache-0.1.0-py3-none-any.whl"
    wheel.touch()

    def fail(command: Sequence[str]) -> None:
        (tmp_path / "env").mkdir(exist_ok=True)
        raise subprocess.CalledProcessError(1, command)

    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            serving.prepare(tmp_path / "env", "0.33.0", wheel, fail)


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "env"), "--vllm", "0.31.0", "--dist", str(tmp_path)]
    assert serving.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve: dist: wanted one turbokv_cache")
    assert not (tmp_path / "env").exists()


def test_make_asks_for_a_model() -> None:
    done = subprocess.run(["make", "serve"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "serve: wanted MODEL=" in done.stderr
