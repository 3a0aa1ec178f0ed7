# SPDX-License-Identifier: Apache-2.0
"""Which vLLM is installed, and whether TurboKV serves on it.

vLLM is found and not imported: its import takes seconds, and brings Prometheus' client, which has
to come after :mod:`.serve` has set its folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Released versions that the plugin serves on, first and last.
OLDEST, NEWEST = (0, 28), (0, 33)
# What the patches of this repository apply to.
PATCHED = (0, 26)
# Where vLLM looks for plugins, and the name of ours there.
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "turbokv"
_HOOKS = "turbokv_hooks.py"
_ANSWER = "turbokv plugin: "
_VERSION = re.compile(r"^__version__ = (?:version = )?['\"]([^'\"]+)['\"]", re.MULTILINE)


@dataclass(frozen=True)
class VLLM:
    """The vLLM that an import would bring.

    Attributes
    ----------
    version
        As it says of itself, or None if it does not say.
    folder
        Its package.
    is_patched
        Whether it carries this repository's hooks.
    """

    version: str | None
    folder: Path
    is_patched: bool

    @property
    def release(self) -> tuple[int, int] | None:
        """Major and minor number, or None if the version does not start with them."""
        found = re.match(r"(\d+)\.(\d+)", self.version or "")
        return (int(found[1]), int(found[2])) if found else None


def find() -> VLLM | None:
    """Return the vLLM that is installed, or None."""
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        path = folder / "_version.py"  # a folder on the path has no metadata, and this says enough
        if path.is_file() and (said := _VERSION.search(path.read_text())):
            return VLLM(said[1], folder, (folder / _HOOKS).is_file())
    folder = folders[0] if folders else Path()
    return VLLM(None, folder, any((path / _HOOKS).is_file() for path in folders))


def wanted() -> str:
    """Return in words what TurboKV serves on, and how to get it."""
    oldest, newest, patched = (".".join(map(str, each)) for each in (OLDEST, NEWEST, PATCHED))
    return (
        f"vLLM {oldest} to {newest} (pip install vllm=={newest}.0), or {patched}.0 with TurboKV's"
        " patch (make build-all)"
    )


def has_plugin() -> bool:
    """Return whether vLLM will find TurboKV's plugin among the entry points that are installed."""
    found = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    return any(point.name == PLUGIN for point in found)


def registration_failure(seconds: float = 120) -> str | None:
    """Return why our plugin does not register with the vLLM that is installed, or None if it does.

    vLLM only logs what a plugin's import raises, and a start with another cache dtype is none of
    ours to refuse. So the entry point is called here in a process of its own, which imports vLLM:
    some seconds.
    """
    code = (
        "from importlib.metadata import entry_points\n"
        f"for point in entry_points(group={PLUGIN_GROUP!r}, name={PLUGIN!r}):\n"
        "    point.load()()\n"
        "from turbokv.integrations.vllm.plugin import why_not\n"
        f"print({_ANSWER!r} + (why_not() or ''), flush=True)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"importing vLLM took more than {seconds:.0f} s"
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if answers:
        return answers[-1].removeprefix(_ANSWER) or None
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return f"its entry point fails: {last[0]}"


def refusal(found: VLLM | None) -> str | None:
    """Return why TurboKV does not serve on this vLLM, or None if it does."""
    if found is None:
        return f"wanted {wanted()}, found none"
    said = found.version or "one that names no version"
    if found.is_patched:
        return None if found.release == PATCHED else f"wanted {wanted()}, found {said}, patched"
    if found.release is None or not OLDEST <= found.release <= NEWEST:
        return f"wanted {wanted()}, found {said} in {found.folder}"
    if not has_plugin():
        return (
            f"wanted the entry point {PLUGIN!r} of {PLUGIN_GROUP}, through which vLLM {said} learns"
            " of TurboKV, found none; install TurboKV's wheel (pip install turbokv_cache-*.whl):"
            " sources on the path are not enough"
        )
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        return (
            f"VLLM_PLUGINS: wanted a list with {PLUGIN!r}, or none set, got {chosen!r}; vLLM loads"
            " no plugin that it leaves out"
        )
    return None
