# SPDX-License-Identifier: Apache-2.0
"""``turbokv serve``: vLLM's OpenAI server on a compressed cache, with our options as flags."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from turbokv.integrations.vllm import installed
from turbokv.integrations.vllm.dtypes import CACHE_DTYPES
from turbokv.integrations.vllm.options import KEY, Options
from turbokv.presets import preset_name, preset_widths

_METRICS = "PROMETHEUS_MULTIPROC_DIR"
# vLLM's flags that ours set
_TAKEN = ("--kv-cache-dtype", "--additional-config")


def arguments(
    model: str, preset: str, options: Mapping[str, Any], extra: Sequence[str] = ()
) -> list[str]:
    """Return the arguments of ``vllm`` that serve ``model``.

    Parameters
    ----------
    model
        A folder, or a name on the Hugging Face hub.
    preset
        A preset: a cache dtype of ours, or its widths such as ``k5v3``.
    options
        Of :class:`Options`; None where vLLM's side decides.
    extra
        Passed on to ``vllm serve``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what was got.
    """
    widths = preset_widths(preset)
    if widths is None or widths not in CACHE_DTYPES.values():
        raise ValueError(f"preset: wanted one of {', '.join(CACHE_DTYPES)}, got {preset!r}")
    for word in extra:
        if word.split("=", 1)[0].replace("_", "-") in _TAKEN:
            raise ValueError(
                f"{word.split('=', 1)[0]}: wanted --preset and other options of `turbokv serve`,"
                " which set it, got both"
            )
    ours = {name: value for name, value in options.items() if value is not None}
    # now rather than after vLLM's imports; the server process reads the same again
    Options.from_config({KEY: ours})
    found = ["serve", model, "--kv-cache-dtype", preset_name(*widths)]
    if ours:
        found += ["--additional-config", json.dumps({KEY: ours})]
    return [*found, *extra]


def check_installed() -> None:
    """Raise ValueError unless TurboKV serves on the vLLM that is installed."""
    reason = installed.refusal(installed.find())
    if reason is not None:
        raise ValueError(f"serve: {reason}")


def run(argv: list[str]) -> None:
    """Run ``vllm`` with ``argv`` in this process, which becomes the web server.

    The window's counters reach ``/metrics`` through files (:mod:`.metrics`), in a folder that lives
    as long as the server.
    """
    check_installed()
    folder = None
    if _METRICS not in os.environ:
        # before the first import of Prometheus' client, which looks at it once
        folder = tempfile.TemporaryDirectory(prefix="turbokv-metrics-")
        os.environ[_METRICS] = folder.name
    sys.argv = ["vllm", *argv]
    try:
        from vllm.entrypoints.cli.main import main

        main()
    finally:
        if folder is not None:
            folder.cleanup()
