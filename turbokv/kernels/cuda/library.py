# SPDX-License-Identifier: Apache-2.0
"""The compiled library: whether it can run on a device, and its custom operators once loaded.

Loading makes ``torch.ops.turbokv.store``, ``decompress``, ``decode`` and ``page_metadata``, with
fake implementations, so that ``torch.compile`` and ``torch.export`` see what they write. All four
return nothing: they write to the tensors that their schemas mark.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from turbokv.core import ScaleRule, VectorFormat
from turbokv.files import check_library
from turbokv.kernels import BackendUnavailableError
from turbokv.kernels.cuda import build, jit
from turbokv.kernels.cuda.build import LIBRARY, Variant

_OPERATORS = ("store", "decompress", "decode", "page_metadata")
# Numbered as scale_rule_t of the headers.
_RULES: tuple[ScaleRule, ...] = ("plain", "norm_corrected", "least_squares", "unbiased")
REMEDY = "with nvcc, 'python -m turbokv.kernels.cuda' builds them"


@dataclass(eq=False)
class Library:
    """A loaded library.

    Attributes
    ----------
    path
        The file.
    archs
        What it has machine code for, e.g. ``("80", "90a")``.
    cuda
        Version of the compiler.
    variants
        What it can launch; :meth:`require` adds to it.
    """

    path: Path
    handle: ctypes.CDLL
    archs: tuple[str, ...]
    cuda: str
    variants: set[Variant]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _loaded: list[ctypes.CDLL] = field(default_factory=list)

    @property
    def driver(self) -> int:
        """CUDA version that the driver supports, e.g. 13000; 0 without a driver."""
        return int(self.handle.turbokv_driver_version())

    @property
    def runtime(self) -> int:
        """CUDA version of the runtime inside the library, e.g. 13000."""
        return int(self.handle.turbokv_runtime_version())

    def runs_on(self, major: int, minor: int) -> bool:
        """Whether there is machine code for a device of this compute capability."""
        return any(_runs(arch, major, minor) for arch in self.archs)

    def require(self, variant: Variant) -> None:
        """Make ``variant`` launchable, compiling it if it is not part of the library.

        Raises
        ------
        BackendUnavailableError
            If it has to be compiled and cannot be (no nvcc, a compiler error), or what was compiled
            does not load.
        """
        if variant in self.variants:
            return
        with self._lock:
            if variant in self.variants:
                return
            try:
                path = jit.compile_variant(variant, device_archs(self.archs))
            except build.BuildError as error:
                raise BackendUnavailableError(
                    f"{variant.name} is not part of the library and could not be compiled: {error}"
                ) from None
            try:
                check_library(path)
                extra = ctypes.CDLL(str(path))
            except OSError as error:  # of a disk that was full, or a machine that went down
                raise BackendUnavailableError(
                    f"{path} does not load: {error}; it is compiled again once it is deleted"
                ) from None
            entry = ctypes.c_char.in_dll(extra, variant.name)
            self.handle.turbokv_register(ctypes.byref(entry))
            self._loaded.append(extra)
            self.variants.add(variant)


def _runs(arch: str, major: int, minor: int) -> bool:
    found = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
    if found is None or int(found[1]) != major:
        return False
    # code for 90a runs on 9.0 only, other code on later minors of its major too
    return int(found[2]) == minor if found[3] == "a" else int(found[2]) <= minor


def device_archs(known: tuple[str, ...]) -> tuple[str, ...]:
    """Return an architecture for each visible device: of ``known``, or the device's own."""
    archs = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        fitting = [arch for arch in known if _runs(arch, major, minor)]
        archs.append(fitting[-1] if fitting else f"{major}{minor}")
    return tuple(dict.fromkeys(archs)) or known


def load() -> Library:
    """Load the library and register its operators; later calls return the same object.

    Raises
    ------
    BackendUnavailableError
        If the file is missing, does not load, or was built from other headers than those beside it:
        it could write other bytes than the rest of TurboKV reads.
    """
    with _loading:  # operators can be registered once only
        return _load(LIBRARY)


_loading = threading.Lock()


@functools.cache
def _load(path: Path) -> Library:
    if not path.is_file():
        raise BackendUnavailableError(f"TurboKV's CUDA kernels are not built ({REMEDY})")
    try:
        check_library(path)
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        handle = ctypes.CDLL(str(path))
        handle.turbokv_build_info.restype = ctypes.c_char_p
        info = json.loads(handle.turbokv_build_info().decode())
    except (OSError, AttributeError) as error:
        raise BackendUnavailableError(
            f"{path} does not load with PyTorch {torch.__version__}: {error}"
        ) from None
    if info["sources"] != build.sources_digest():
        raise BackendUnavailableError(
            f"{path} was built from other headers than those beside it; {REMEDY}"
        )
    handle.turbokv_register.argtypes = [ctypes.c_void_p]
    handle.turbokv_register.restype = None
    for name in _OPERATORS:
        torch.library.register_fake(f"turbokv::{name}", _writes_only)
    return Library(
        path=path,
        handle=handle,
        archs=tuple(info["archs"]),
        cuda=info["cuda"],
        variants={Variant(*fields) for fields in info["variants"]},
    )


def _writes_only(*args: object, **kwargs: object) -> None:
    """Fake of an operator whose only results are the tensors it is given to write."""


# Devices that were found to run a library: asking the driver again would cost as much as a launch.
_usable: set[tuple[Path, torch.device]] = set()


def why_unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on tensors of ``device``, or None if they can.

    Initialises CUDA if the library is there and PyTorch sees a device.
    """
    if (LIBRARY, device) in _usable:
        return None
    if device.type != "cuda":
        return f"TurboKV's CUDA kernels need CUDA tensors, got device {device}"
    try:
        library = load()
    except BackendUnavailableError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if library.driver // 1000 < library.runtime // 1000:
        return (
            f"the NVIDIA driver supports CUDA {library.driver // 1000}, and TurboKV's CUDA kernels"
            f" are built with CUDA {library.runtime // 1000}: a newer driver is needed"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if not library.runs_on(major, minor):
        return (
            f"TurboKV's CUDA kernels are built for {_names(library.archs)}, and {device} is"
            f" sm_{major}{minor}; {REMEDY}"
        )
    _usable.add((LIBRARY, device))
    return None


def _names(archs: tuple[str, ...]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)


# --- formats --------------------------------------------------------------------------------------

_TEXT = "_operator_text"


def format_text(fmt: VectorFormat) -> str:
    """Return ``fmt`` as the operators take it: a line of text.

    Text, because operators take no structures, and a handle would not survive the caches that
    compiled graphs are kept in. The first call for a format reads its signs from the device, which
    synchronises, and keeps the text with the format. ``torch.compile`` sees a kept text as a
    constant; one that is not kept yet breaks its graph.
    """
    text: str | None = getattr(fmt, _TEXT, None)
    return _keep_text(fmt) if text is None else text


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _keep_text(fmt: VectorFormat) -> str:
    book = fmt.codebook
    text = " ".join(
        [
            str(fmt.head_dim),
            str(book.bits),
            str(_RULES.index(fmt.scale_rule)),
            str(book.frac_bits),
            float(book.step).hex(),
            ",".join(str(int(m)) for m in book.magnitudes),
            ",".join(f"{word:x}" for word in sign_words(fmt.signs)),
        ]
    )
    fmt.__dict__[_TEXT] = text  # as cached_property does: frozen classes refuse setattr
    return text


def sign_words(signs: Tensor) -> list[int]:
    """Return which coordinates are negated: bit ``j % 32`` of word ``j // 32``; 16 words."""
    # signs are data even where shapes alone are traced
    with _disable_current_modes():
        values = signs.tolist()
    words = [0] * 16
    for j, sign in enumerate(values):
        words[j // 32] |= int(sign < 0) << (j % 32)
    return words
