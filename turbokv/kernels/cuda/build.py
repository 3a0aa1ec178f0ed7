# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels: ahead of time into one library, or one variant just in time.

Standard library only, and PyTorch's headers are found without importing PyTorch, so that a build
back end can load this file by its path. One object is compiled per kernel, head size and pair of
widths; an object whose command and included files have not changed is kept.

The library is free of Python and of PyTorch's C++ symbols: one build serves every Python and every
PyTorch from :data:`OLDEST_TORCH` on, with CUDA or without.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"
SOURCES = HERE / "standalone_kernels"
LIBRARY = HERE / "libturbokv_cuda.so"

OLDEST_TORCH = (2, 11)
DEVELOPMENT_ARCHS = ("90a",)
RELEASE_ARCHS = ("80", "90a", "100", "120")
# Kernels compiled per head size, decode per pair of widths too. Page metadata is in the binding.
KINDS = ("store", "decompress", "decode")
DIMS = (64, 128, 256)
# Every cache dtype of integrations/vllm/dtypes.py: a server needs no compiler for them.
PAIRS = (
    (4, 4),
    (3, 3),
    (2, 2),
    (8, 4),
    (5, 5),
    (5, 4),
    (5, 3),
    (4, 3),
    (4, 2),
    (3, 2),
)
_NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-compress-mode=size",  # a fifth of the default's size; drivers for CUDA 12.4 and up read it
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",
    f"-Xcompiler=-fmacro-prefix-map={HERE}=turbokv/kernels/cuda",  # messages name no build machine
)
# -s: local symbols hold the names of the compiler's temporary files, which no two builds share
_LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL,-s")
_EXPORTS = "{ global: turbokv_*; local: *; };\n"


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message holds what it printed."""


@dataclass(frozen=True)
class Variant:
    """One instantiation of a kernel.

    Attributes
    ----------
    kind
        ``store``, ``decompress`` or ``decode``.
    padded_dim
        Coordinates stored per vector.
    k_bits, v_bits
        Widths; 0 for store and decompress, whose variants take every width.
    lookup2
        Whether 2-bit codebooks may be other than ``{m, 3 m}``: decode only.
    """

    kind: str
    padded_dim: int
    k_bits: int = 0
    v_bits: int = 0
    lookup2: bool = False

    @property
    def name(self) -> str:
        """Name of the object file, and of the C symbol that describes the variant."""
        widths = f"_k{self.k_bits}v{self.v_bits}" if self.k_bits else ""
        suffix = "_lookup2" if self.lookup2 else ""
        return f"turbokv_{self.kind}_p{self.padded_dim}{widths}{suffix}"

    def defines(self) -> list[str]:
        """Return the macros that the kernel's source is compiled with."""
        return [
            f"-DTURBOKV_ENTRY={self.name}",
            f"-DTURBOKV_PADDED_DIM={self.padded_dim}",
            f"-DTURBOKV_K_BITS={self.k_bits}",
            f"-DTURBOKV_V_BITS={self.v_bits}",
            f"-DTURBOKV_LOOKUP2={int(self.lookup2)}",
        ]


def variants(
    kinds: Sequence[str] = KINDS,
    dims: Sequence[int] = DIMS,
    pairs: Sequence[tuple[int, int]] = PAIRS,
) -> list[Variant]:
    """Return the variants to compile ahead of time, largest first."""
    # decode compiles longest: started first, it does not trail the build
    order = [kind for kind in reversed(KINDS) if kind in kinds]
    return [
        Variant(kind, dim, *widths)
        for kind in order
        for dim in sorted(dims, reverse=True)
        for widths in (pairs if kind == "decode" else ((),))
    ]


def sources_digest() -> str:
    """Return a SHA-256 over the headers and kernel sources, names and contents."""
    digest = hashlib.sha256()
    for path in sorted([*INCLUDE.rglob("*.cuh"), *SOURCES.iterdir()]):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(HERE).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


# --- tools ----------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """Return the CUDA compiler of ``CUDA_HOME`` if that is set, else the one on the path."""
    home = os.environ.get("CUDA_HOME")
    inside = os.path.join(home, "bin", "nvcc") if home else None
    return inside if inside and os.path.exists(inside) else shutil.which("nvcc")


def nvcc_version(nvcc: str) -> str:
    """Return what the compiler says of its release, e.g. ``13.0, V13.0.88``."""
    try:
        out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from None
    found = re.search(r"release (.+)", out)
    return found[1].strip() if found else out.strip()


def require_nvcc() -> str:
    """Return the CUDA compiler, or raise BuildError saying what to do."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "nvcc: wanted the CUDA compiler in CUDA_HOME/bin or on PATH, found none;"
            " install the CUDA toolkit 13"
        )
    return nvcc


def torch_root() -> Path:
    """Return the folder of the installed PyTorch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch: wanted an installed PyTorch, for its headers, found none")
    root = Path(next(iter(spec.submodule_search_locations)))
    if not (root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"torch: wanted headers of PyTorch {oldest} or newer in {root}")
    return root


def check_archs(archs: Sequence[str]) -> tuple[str, ...]:
    """Return the architectures if each looks like ``80`` or ``90a``, else raise ValueError."""
    for arch in archs:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch):
            raise ValueError(f"archs: wanted numbers such as 80 or 90a, got {arch!r}")
    if not archs:
        raise ValueError("archs: wanted at least one architecture, got none")
    return tuple(dict.fromkeys(archs))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(f"failed ({done.returncode}): {' '.join(command)}\n{done.stdout}")
    if done.stdout.strip():
        print(done.stdout.rstrip(), file=sys.stderr)


def _base_command(nvcc: str, archs: Sequence[str]) -> list[str]:
    command = [nvcc, *_NVCC_FLAGS, f"-I{INCLUDE}", f"-I{HERE}"]
    if os.environ.get("CXX"):
        command += ["-ccbin", os.environ["CXX"]]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return command


# --- objects --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    """A source, the flags it is compiled with, and where its object goes."""

    source: Path
    target: Path
    command: tuple[str, ...]

    @property
    def _stamp(self) -> Path:
        return self.target.with_suffix(".stamp")

    def _state(self, dependencies: Sequence[str], version: str) -> dict[str, str]:
        """Digests of the command and of the files that the object was made from."""
        state = {"": hashlib.sha256("\0".join([version, *self.command]).encode()).hexdigest()}
        for name in dependencies:
            path = Path(name)
            content = path.read_bytes() if path.is_file() else b"gone"
            state[name] = hashlib.sha256(content).hexdigest()
        return state

    def is_fresh(self, version: str) -> bool:
        try:
            kept: dict[str, str] = json.loads(self._stamp.read_text())
        except (OSError, ValueError):
            return False
        return self.target.is_file() and kept == self._state([k for k in kept if k], version)

    def compile(self, version: str) -> None:
        depfile = self.target.with_suffix(".d")
        self._stamp.unlink(missing_ok=True)
        # file-local symbols get a random seed in their names; fixing it makes builds reproducible
        seed = f"-frandom-seed={self.target.stem}"
        _run([*self.command, seed, "-MD", "-MF", str(depfile), "-c", "-o", str(self.target)])
        names = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        # the toolkit's own headers change only with its version
        ours = [name for name in names if Path(name).resolve().is_relative_to(HERE)]
        state = self._state([str(self.source), *ours], version)
        self._stamp.write_text(json.dumps(state))


def _objects(
    folder: Path, nvcc: str, archs: Sequence[str], chosen: Sequence[Variant]
) -> Iterator[_Object]:
    base = _base_command(nvcc, archs)
    for variant in chosen:
        source = SOURCES / f"{variant.kind}.cu"
        command = (*base, *variant.defines(), str(source))
        yield _Object(source, folder / f"{variant.name}.o", command)
    torch_include = torch_root() / "include"
    version = OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48
    binding = (
        *base,
        "-isystem",
        str(torch_include),
        f"-Xcompiler=-fmacro-prefix-map={torch_include}=torch/include",
        f"-DTORCH_TARGET_VERSION=0x{version:016x}",
        str(HERE / "binding.cu"),
    )
    yield _Object(HERE / "binding.cu", folder / "binding.o", binding)
    table = folder / "table.cpp"
    yield _Object(table, folder / "table.o", (*base, str(table)))


def _write_table(folder: Path, nvcc: str, archs: Sequence[str], chosen: Sequence[Variant]) -> None:
    """Write the source that lists the variants, and what the library was built from."""
    info = json.dumps(
        {
            "archs": list(archs),
            "cuda": nvcc_version(nvcc),
            "sources": sources_digest(),
            "variants": [dataclasses.astuple(variant) for variant in chosen],
        }
    )
    names = [variant.name for variant in chosen]
    lines = [
        "// Generated by turbokv/kernels/cuda/build.py",
        '#include "standalone_kernels/registry.h"',
        'extern "C" {',
        *(f"extern const turbokv::kernel_entry_t {name};" for name in names),
        "const turbokv::kernel_entry_t* const turbokv_table[] = {",
        *(f"    &{name}," for name in names),
        "    nullptr};",
        f'const char* turbokv_build_info() {{ return R"json({info})json"; }}',
        "}",
    ]
    text = "\n".join(lines) + "\n"
    path = folder / "table.cpp"
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def build_library(
    target: Path = LIBRARY,
    *,
    folder: Path,
    archs: Sequence[str] = DEVELOPMENT_ARCHS,
    chosen: Sequence[Variant] | None = None,
    jobs: int | None = None,
    verbose: bool = False,
) -> Path:
    """Compile what has changed and link the library.

    Parameters
    ----------
    target
        The library to write; replaced in one step.
    folder
        Where objects are kept between builds.
    archs
        Architectures, e.g. ``("80", "90a")``: machine code for each, and none for any other.
    chosen
        Variants to include; default :func:`variants`.
    jobs
        Compilers at a time; default one a core.
    verbose
        Print the name of each object as it is compiled.

    Returns
    -------
    Path
        ``target``.

    Raises
    ------
    BuildError
        If nvcc or PyTorch's headers are missing, or a compiler fails.
    """
    nvcc, archs = require_nvcc(), check_archs(archs)
    version = nvcc_version(nvcc)
    chosen = variants() if chosen is None else chosen
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder, nvcc, archs, chosen)
    objects = list(_objects(folder, nvcc, archs, chosen))
    stale = [each for each in objects if not each.is_fresh(version)]
    if stale:
        (folder / LIBRARY.name).unlink(missing_ok=True)  # a build that fails is taken up again

    def compile_one(each: _Object) -> None:
        if verbose:
            print(f"nvcc {each.target.name}", flush=True)
        each.compile(version)

    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        for future in [pool.submit(compile_one, each) for each in stale]:
            future.result()
    linked = folder / LIBRARY.name
    if not linked.is_file():
        _link(linked, folder, nvcc, objects)
    # another folder's build may have written the target since
    if not target.is_file() or not filecmp.cmp(linked, target, shallow=False):
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        try:
            shutil.copyfile(linked, fresh)
            os.replace(fresh, target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
    return target


def _link(target: Path, folder: Path, nvcc: str, objects: Sequence[_Object]) -> None:
    exports = folder / "exports.map"
    exports.write_text(_EXPORTS)
    # PyTorch is linked by name only, so that its C functions are found in whichever is loaded.
    _run(
        [
            nvcc,
            *_LINK_FLAGS,
            f"-Xlinker=--version-script={exports}",
            *(str(each.target) for each in objects),
            f"-Xlinker=-L{torch_root() / 'lib'}",
            "-Xlinker=--no-as-needed",
            "-ltorch_cpu",
            "-ldl",
            "-o",
            str(target),
        ]
    )


def build_variant(target: Path, variant: Variant, archs: Sequence[str]) -> None:
    """Compile one variant into a library of its own, which needs no PyTorch.

    Parameters
    ----------
    target
        The library to write. It exports the variant's description under :attr:`Variant.name`.
    variant, archs
        What to compile, and for which architectures.

    Raises
    ------
    BuildError
        If nvcc is missing or fails.
    """
    exports = target.with_suffix(".map")
    exports.write_text(_EXPORTS)
    _run(
        [
            *_base_command(require_nvcc(), check_archs(archs)),
            *variant.defines(),
            *_LINK_FLAGS,
            f"-Xlinker=--version-script={exports}",
            str(SOURCES / f"{variant.kind}.cu"),
            "-o",
            str(target),
        ]
    )


def _pair(text: str) -> tuple[int, int]:
    # this file is loaded by its path, too: it cannot import the presets
    equal = re.fullmatch(r"tq(\d)", text)
    found = re.fullmatch(r"(?:tq_)?[kK]?(\d)[vV]?(\d)", text)
    if equal is not None:
        return int(equal[1]), int(equal[1])
    if found is None:
        raise argparse.ArgumentTypeError(f"wanted a pair such as tq_k5v3, got {text!r}")
    return int(found[1]), int(found[2])


def _objects_folder() -> Path:
    """Return where objects are kept: ``build`` of a source tree, else of the current folder."""
    root = HERE.parents[2]
    return (root if (root / "build_backend.py").is_file() else Path.cwd()) / "build" / "cuda"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the library from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m turbokv.kernels.cuda", description="Compile TurboKV's CUDA kernels."
    )
    parser.add_argument(
        "--archs", nargs="+", default=DEVELOPMENT_ARCHS, help="e.g. 80 90a, or release; default 90a"
    )
    parser.add_argument("--release", action="store_true", help=f"compile for {RELEASE_ARCHS}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--dims", nargs="+", type=int, default=DIMS)
    parser.add_argument("--pairs", nargs="+", type=_pair, default=PAIRS, help="e.g. tq4 tq_k5v3")
    parser.add_argument("--jobs", type=int, help="compilers at a time; default one a core")
    parser.add_argument("--target", type=Path, default=LIBRARY)
    parser.add_argument("--folder", type=Path, default=_objects_folder(), help="for objects")
    options = parser.parse_args(arguments)
    is_release = options.release or options.archs == ["release"]
    archs = RELEASE_ARCHS if is_release else options.archs
    chosen = variants(options.kinds, options.dims, options.pairs)
    try:
        path = build_library(
            options.target,
            # other architectures do not throw away these objects
            folder=options.folder / "-".join(archs),
            archs=archs,
            chosen=chosen,
            jobs=options.jobs,
            verbose=True,
        )
    except (BuildError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(chosen)} variants, {' '.join(archs)}")
    return 0
