#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the environment that ``make serve`` runs in: released vLLM and the wheel of ``dist/``.

    python3.12 scripts/serving_environment.py .venv-serve --vllm 0.33.0

It has an environment of its own, because vLLM pins a PyTorch and the developer's has another. The
Python that runs this becomes the environment's. What is there already is kept; a wheel that was
built anew is installed anew.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# First Python of a vLLM, by the first vLLM that asks for it; ours goes up to the second.
_OLDEST_PYTHON = (((0, 32), (3, 11)), ((0, 0), (3, 10)))
_NEWEST_PYTHON = (3, 13)
_WHEEL = "turbokv_cache-*.whl"

Run = Callable[[Sequence[str]], object]


def check_python(vllm: str, python: tuple[int, int]) -> None:
    """Raise ValueError unless a Python serves for a release of vLLM."""
    found = re.match(r"(\d+)\.(\d+)\.\d+$", vllm)
    if found is None:
        raise ValueError(f"vllm: wanted a release such as 0.33.0, got {vllm!r}")
    release = (int(found[1]), int(found[2]))
    oldest = next(least for first, least in _OLDEST_PYTHON if release >= first)
    if not oldest <= python <= _NEWEST_PYTHON:
        low, high, got = (".".join(map(str, each)) for each in (oldest, _NEWEST_PYTHON, python))
        raise ValueError(
            f"python: wanted Python {low} to {high} for vLLM {vllm}, got {got}; name one, e.g."
            " make serve PYTHON=python3.12"
        )


def find_wheel(dist: Path) -> Path:
    """Return TurboKV's one wheel in a folder, or raise ValueError."""
    found = sorted(dist.glob(_WHEEL))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"dist: wanted one {_WHEEL} in {dist} (make wheel, or put a downloaded one there), got"
            f" {names}"
        )
    return found[0]


def prepare(folder: Path, vllm: str, wheel: Path, run: Run) -> None:
    """Install what is missing.

    Parameters
    ----------
    folder
        The environment; made if it is not there.
    vllm
        Its release.
    wheel
        TurboKV's.
    run
        Runs a command, and raises if it fails.
    """
    stamp = folder / "turbokv.stamp"
    was = stamp.read_text().split() if stamp.is_file() else []
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if was == [vllm, wheel.name, digest]:
        return
    python = folder / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder)])
    stamp.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if was[:1] != [vllm]:
        print(f"installing vLLM {vllm} into {folder}: about 9 GB, some minutes", flush=True)
    # one command, so that pip finds a PyTorch that both accept
    run([*pip, f"vllm=={vllm}", str(wheel)])
    if was:  # the version of a wheel that was built anew may be the same
        run([*pip, "--force-reinstall", "--no-deps", str(wheel)])
    stamp.write_text(f"{vllm} {wheel.name} {digest}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and make the environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the environment")
    parser.add_argument("--vllm", default="0.33.0", help="its release; default %(default)s")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the wheel is")
    args = parser.parse_args(arguments)
    try:
        check_python(args.vllm, sys.version_info[:2])
        prepare(args.folder, args.vllm, find_wheel(args.dist), _run)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    return 0


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
