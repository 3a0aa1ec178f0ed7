# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels: store, decompress and attend to compressed pages.

Each function checks its arguments and launches a custom operator of the same name in
``torch.ops.turbokv``, so that ``torch.compile`` and CUDA graphs work. The operators come from one
library, compiled ahead of time for common head sizes and widths
(:mod:`turbokv.kernels.cuda.build`). Other variants are compiled when they are first used, which
takes a minute and nvcc, and kept in the user's cache folder (:mod:`turbokv.kernels.cuda.jit`).
"""

from __future__ import annotations

from turbokv.kernels.cuda.library import why_unavailable
from turbokv.kernels.cuda.ops import (
    Body,
    decode,
    decode_workspace_bytes,
    decompress,
    page_metadata,
    prepare,
    store,
)

__all__ = [
    "Body",
    "decode",
    "decode_workspace_bytes",
    "decompress",
    "page_metadata",
    "prepare",
    "store",
    "why_unavailable",
]
