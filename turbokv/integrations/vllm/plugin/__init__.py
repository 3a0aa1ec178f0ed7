# SPDX-License-Identifier: Apache-2.0
"""What makes an unpatched vLLM know our cache dtypes: its entry point ``vllm.general_plugins``.

vLLM calls :func:`register` in every process, before it reads its arguments. Told to vLLM are

- the backend TURBOKV, by name;
- that TURBOKV serves our dtypes and no others, that its pages count where vLLM sizes all by one
  backend's, and what a configuration must not ask for (:mod:`.platform`);
- that pages are forgotten after workers took other weights (:mod:`.engine`);
- last, the cache dtypes (:mod:`.cache_dtypes`): whoever can name one finds the rest in place.

vLLM ends a start, whatever its cache dtype, if a plugin raises, so nothing is raised here. What
went wrong is kept: :func:`why_not` says it, a start with one of our dtypes raises it, and ``turbokv
doctor`` shows it.
"""

from __future__ import annotations

import importlib.util
import logging

logger = logging.getLogger("vllm.turbokv")

_PATCHED = "vllm.turbokv_hooks"
# What register() found and did, in order; and why it did not finish.
_done: list[str] = []
_failure: list[str] = []
_started: list[bool] = []


class RegistrationError(RuntimeError):
    """The vLLM that runs does not know our cache dtypes, or not wholly."""


def is_patched() -> bool:
    """Whether the vLLM that is installed has our hooks in its own code, and needs no plugin."""
    return importlib.util.find_spec(_PATCHED) is not None


def register() -> None:
    """Make this process's vLLM know our dtypes; does nothing where it is patched, or the 2nd time.

    Imports vLLM's configuration and platform; the backend only when a layer needs it. Never raises:
    a run with another cache dtype is none of our business.
    """
    if _started or is_patched():
        return
    _started.append(True)
    try:
        _register()
    except Exception as error:
        _failure.append(f"{type(error).__name__}: {error}")
        logger.exception(
            "TurboKV could not register with this vLLM: kv_cache_dtype=tq4 and its like are not"
            " available. Other cache dtypes are not affected."
        )


def _register() -> None:
    from turbokv.integrations.vllm.plugin import (
        backends,
        cache_dtypes,
        engine,
        features,
        platform,
    )

    lacking = features.missing()
    if lacking:
        _failure.append(features.refusal(lacking))
        logger.warning("TurboKV: %s", _failure[-1])
        return
    _done.append(f"backend: {backends.add()}")
    _done.append(f"platform: {platform.extend()}")
    _done.append(f"weights: {engine.wrap_if_imported()}")
    _done.append(f"dtypes: {cache_dtypes.add()}")


def why_not() -> str | None:
    """Return why our dtypes cannot be used in this process, or None if they can."""
    if is_patched():
        return None
    if _failure:
        return "; ".join(_failure)
    if not _done:
        return (
            "the plugin was not loaded: VLLM_PLUGINS leaves out turbokv, or its entry point is not"
            " installed (pip install the turbokv wheel beside vLLM)"
        )
    return None


def steps() -> list[str]:
    """Return what :func:`register` did in this process, a line a step."""
    return list(_done)


def require() -> None:
    """Raise unless registration was finished.

    Raises
    ------
    RegistrationError
        Saying why it was not.
    """
    reason = why_not()
    if reason is not None:
        raise RegistrationError(f"TurboKV is not registered with this vLLM: {reason}")
