# SPDX-License-Identifier: Apache-2.0
"""A worker of vLLM's CPU engine in a process of its own, with our backend in the only place."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

register_backend(AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.TURBOKV.value)


class Worker(CPUWorker):  # type: ignore[misc]
    """As vLLM has it; importing this module is what matters."""
