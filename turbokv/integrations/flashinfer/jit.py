# SPDX-License-Identifier: Apache-2.0
"""Prefill modules for FlashInfer's JIT and AOT builds, one a head size and pair of widths.

Sources lie in the fork (``csrc/turbokv_*``, ``include/turbokv``), where its build copies them to
from this package; a module is rendered, built, cached and found like FlashInfer's own, under a URI
that starts with ``turbokv_``.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import jinja2
from flashinfer.jit import env as jit_env
from flashinfer.jit.core import JitSpec, gen_jit_spec
from flashinfer.jit.utils import write_if_different

from turbokv.core import VectorFormat
from turbokv.integrations.flashinfer.checks import HEAD_DIMS
from turbokv.kernels.cuda.library import sign_words
from turbokv.paged import PAGE_BITS

# What is worth building ahead of time: the pairs that turbokv.kernels.cuda builds.
AOT_BITS = ((4, 4), (3, 3), (2, 2), (5, 3), (5, 4), (4, 3))
_CONFIG = "turbokv_batch_prefill_config"
_KERNEL = "turbokv_batch_prefill_kernel_inst.jinja"
_SOURCE = "turbokv_batch_prefill.cu"
_MASKS = {"none": "MaskMode::kNone", "causal": "MaskMode::kCausal"}


def prefill_uri(head_dim: int, k_bits: int, v_bits: int, use_logits_soft_cap: bool) -> str:
    """Return the name of a module; ``head_dim`` is the padded one."""
    cap = "_softcap" if use_logits_soft_cap else ""
    return f"turbokv_batch_prefill_head_dim_{head_dim}_k{k_bits}v{v_bits}{cap}"


def gen_prefill_module(
    head_dim: int, k_bits: int, v_bits: int, use_logits_soft_cap: bool = False
) -> JitSpec:
    """Render the sources of a module.

    Parameters
    ----------
    head_dim
        Coordinates stored: 64, 128 or 256.
    k_bits, v_bits
        Widths: 2, 3, 4, 5 or 8.
    use_logits_soft_cap
        Whether logits go through ``cap * tanh(x / cap)``.

    Raises
    ------
    ValueError
        Naming the argument, what was wanted and what was got.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: wanted one of {HEAD_DIMS}, got {head_dim}")
    for name, bits in (("k_bits", k_bits), ("v_bits", v_bits)):
        if bits not in PAGE_BITS:
            raise ValueError(f"{name}: wanted one of {PAGE_BITS}, got {bits}")
    uri = prefill_uri(head_dim, k_bits, v_bits, use_logits_soft_cap)
    csrc: Path = jit_env.FLASHINFER_CSRC_DIR
    folder: Path = jit_env.FLASHINFER_GEN_SRC_DIR / uri
    folder.mkdir(parents=True, exist_ok=True)
    config = jinja2.Template((csrc / f"{_CONFIG}.jinja").read_text()).render(
        head_dim=head_dim,
        k_bits=k_bits,
        v_bits=v_bits,
        use_logits_soft_cap=str(use_logits_soft_cap).lower(),
    )
    write_if_different(folder / f"{_CONFIG}.inc", config)
    kernel = jinja2.Template((csrc / _KERNEL).read_text())
    sources = [folder / f"turbokv_batch_prefill_kernel_{name}.cu" for name in _MASKS]
    for path, mask_mode in zip(sources, _MASKS.values(), strict=True):
        write_if_different(path, kernel.render(mask_mode=mask_mode))
    write_if_different(folder / _SOURCE, (csrc / _SOURCE).read_text())
    return gen_jit_spec(uri, [*sources, folder / _SOURCE])


def gen_turbokv_modules() -> list[JitSpec]:
    """Return the modules of FlashInfer's AOT builds."""
    return [
        gen_prefill_module(head_dim, k_bits, v_bits)
        for head_dim, (k_bits, v_bits) in itertools.product(HEAD_DIMS, AOT_BITS)
    ]


@functools.cache
def get_prefill_module(
    head_dim: int, k_bits: int, v_bits: int, use_logits_soft_cap: bool = False
) -> Any:
    """Build a module if need be, and load it: ``plan`` and ``run``."""
    return gen_prefill_module(head_dim, k_bits, v_bits, use_logits_soft_cap).build_and_load()


def format_words(fmt: VectorFormat) -> list[int]:
    """Return ``fmt`` as modules take it: ``frac_bits``, 16 sign words, magnitudes (not at 8 bits).

    Reads the signs from the device, which synchronises.
    """
    book = fmt.codebook
    magnitudes = [] if book.bits == 8 else [int(m) for m in book.magnitudes]
    return [book.frac_bits, *sign_words(fmt.signs), *magnitudes]
