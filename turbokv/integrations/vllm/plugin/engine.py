# SPDX-License-Identifier: Apache-2.0
"""Cached pages are forgotten when workers took other weights: vLLM has no point for it."""

from __future__ import annotations

import functools
import sys
from typing import Any

_MODULE = "vllm.v1.engine.core"
_MARK = "_turbokv_wrapped"


def wrap_if_imported() -> str:
    """Wrap the engine core if this process has it already, as its own process has; returns how."""
    if _MODULE not in sys.modules:
        return "not in this process"
    wrap()
    return "wrapped"


def wrap() -> None:
    """Let ``EngineCore.collective_rpc`` end with :func:`hooks.after_worker_call`."""
    from vllm.v1.engine.core import EngineCore

    call = EngineCore.collective_rpc
    if getattr(call, _MARK, False):
        return

    @functools.wraps(call)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        from turbokv.integrations.vllm import hooks

        result = call(self, method, *args, **kwargs)
        hooks.after_worker_call(self, method)
        return result

    setattr(collective_rpc, _MARK, True)
    EngineCore.collective_rpc = collective_rpc
