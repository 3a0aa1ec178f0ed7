# SPDX-License-Identifier: Apache-2.0
"""Wheels of the forks, equal byte for byte whenever they are built from equal inputs."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from forks.base import Fork, ForkError, apply_patches, download, patched_paths, unpack

_DATE = (2026, 1, 1, 0, 0, 0)  # of every member that is written here
_EPOCH = "1767225600"  # the same, for tools that read SOURCE_DATE_EPOCH
# What FlashInfer's back end asks for, pinned: another version writes other metadata.
_FLASHINFER_BUILD = ("setuptools==84.2.1", "packaging==26.4", "apache-tvm-ffi==0.1.10")

_KERNELS = "turbokv/kernels/cuda/libturbokv_cuda.so"


def identity_module(root: Path) -> ModuleType:
    """Load ``turbokv.integrations.build_identity`` by its path: importing turbokv needs PyTorch."""
    path = root / "turbokv" / "integrations" / "build_identity.py"
    spec = importlib.util.spec_from_file_location("turbokv_identity", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def identity(root: Path) -> tuple[str, bytes, str]:
    """Return name and content of the file that says what was built, and turbokv's version."""
    module = identity_module(root)
    fields = module.identity(root / "turbokv")
    return module.FILE, module.render(fields).encode(), module.wheel_version(fields)


def requirement(root: Path) -> str:
    """Return what a fork requires: exactly the turbokv it is built with."""
    module = identity_module(root)
    return f"{module.DISTRIBUTION}=={module.wheel_version(module.identity(root / 'turbokv'))}"


# --- what goes into a fork ------------------------------------------------------------------------


def header_folders(root: Path) -> tuple[Path, ...]:
    """Return the folders whose ``turbokv/**/*.cuh`` FlashInfer compiles."""
    package = root / "turbokv"
    return (package / "kernels/cuda/include", package / "integrations/flashinfer/include")


def overlay(fork: Fork) -> dict[str, Path]:
    """Return files to add to a fork's tree, by their path there."""
    found: dict[str, Path] = {}

    def add(folder: Path, below: str = "") -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[below + path.relative_to(folder).as_posix()] = path

    if fork.name == "flashinfer":
        for folder in header_folders(fork.root):
            add(folder / "turbokv", "include/turbokv/")
        add(fork.root / "turbokv/integrations/flashinfer/csrc", "csrc/")
    add(fork.shims)
    return found


def inputs_digest(fork: Fork) -> str:
    """Return a hash of everything that decides a fork's wheel."""
    files = {f"overlay/{name}": path for name, path in overlay(fork).items()}
    files |= {f"patch/{path.name}": path for path in fork.patches}
    # every BASE: vLLM's wheel names the version of FlashInfer's
    files |= {f"BASE/{p.parent.name}": p for p in fork.root.glob("patches/*/BASE")}
    return _digest(files, identity(fork.root)[1])


def turbokv_digest(root: Path, archs: str) -> str:
    """Return a hash of everything that decides turbokv's own wheel."""
    names = (
        "pyproject.toml",
        "setup.py",
        "build_backend.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    )
    files = {name: root / name for name in names}
    for path in (root / "turbokv").rglob("*"):
        if path.is_file() and path.suffix not in (".pyc", ".so", ".o"):
            files[path.relative_to(root).as_posix()] = path
    tools = [importlib.metadata.version(name) for name in ("setuptools", "torch")]
    compiler = os.environ.get("CUDA_HOME") or shutil.which("nvcc") or "no nvcc"
    return _digest(files, " ".join([archs, compiler, *tools]).encode())


def _digest(files: dict[str, Path], more: bytes) -> str:
    digest = hashlib.sha256(more)
    here = Path(__file__).resolve().parent
    for name, path in sorted(
        {**files, **{f"script/{p.name}": p for p in here.glob("*.py")}}.items()
    ):
        digest.update(f"\0{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# --- deterministic archives -----------------------------------------------------------------------


def _record_row(name: str, content: bytes) -> list[str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [name, f"sha256={digest}", str(len(content))]


def _add(wheel: zipfile.ZipFile, name: str, content: bytes, mode: int = 0o644) -> None:
    info = zipfile.ZipInfo(name, _DATE)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (0o100000 | mode) << 16
    wheel.writestr(info, content, zipfile.ZIP_DEFLATED, 6)


def _copy_raw(source: zipfile.ZipFile, info: zipfile.ZipInfo, target: zipfile.ZipFile) -> None:
    """Copy a member as it is compressed: large libraries need not be compressed again."""
    assert source.fp is not None and target.fp is not None
    source.fp.seek(info.header_offset + 26)
    name_size, extra_size = (int.from_bytes(source.fp.read(2), "little") for _ in range(2))
    source.fp.seek(name_size + extra_size, 1)
    copy = zipfile.ZipInfo(info.filename, info.date_time)
    copy.compress_type, copy.external_attr = info.compress_type, info.external_attr
    copy.create_system = info.create_system
    copy.CRC, copy.file_size = info.CRC, info.file_size
    copy.compress_size = info.compress_size
    copy.header_offset = target.fp.tell()
    target.fp.write(copy.FileHeader(zip64=False))
    rest = info.compress_size
    while rest:
        block = source.fp.read(min(rest, 1 << 22))
        if not block:
            raise ForkError(f"{info.filename}: the wheel ends early")
        target.fp.write(block)
        rest -= len(block)
    target.filelist.append(copy)
    target.NameToInfo[copy.filename] = copy
    target.start_dir = target.fp.tell()


def rewrite(
    source_path: Path, target_path: Path, changes: dict[str, bytes], renames: dict[str, str]
) -> None:
    """Write a wheel with some members changed or added, in sorted order, RECORD included.

    Parameters
    ----------
    source_path, target_path
        The wheel that is read, and the one that is written.
    changes
        Contents by (new) name.
    renames
        Beginnings of names, such as of the ``.dist-info`` folder, and what replaces them.
    """

    def renamed(name: str) -> str:
        for old, new in renames.items():
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    partial = target_path.with_name(target_path.name + ".partial")
    with zipfile.ZipFile(source_path) as source, zipfile.ZipFile(partial, "w") as target:
        members = {renamed(i.filename): i for i in source.infolist() if not i.is_dir()}
        record = next(name for name in members if name.endswith(".dist-info/RECORD"))
        old_rows: dict[str, list[str]] = {}
        for row in csv.reader(source.read(members[record].filename).decode().splitlines()):
            old_rows[renamed(row[0])] = [renamed(row[0]), *row[1:]]
        rows = []
        for name in sorted({*members, *changes} - {record}):
            info = members.get(name)
            if name in changes:
                mode = info.external_attr >> 16 & 0o777 if info is not None else 0o644
                _add(target, name, changes[name], mode or 0o644)
                rows.append(_record_row(name, changes[name]))
            elif info is not None and info.filename == name:
                _copy_raw(source, info, target)
                rows.append(old_rows[name])
            elif info is not None:
                _add(target, name, source.read(info), info.external_attr >> 16 & 0o777 or 0o644)
                rows.append(old_rows[name])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, [record, "", ""]])
        _add(target, record, text.getvalue().encode())
    partial.replace(target_path)


# --- the wheels -----------------------------------------------------------------------------------


def build_turbokv(root: Path, dist: Path, archs: str, jobs: int) -> Path:
    """Build turbokv's own wheel.

    Parameters
    ----------
    root
        The repository.
    dist
        Where the wheel goes.
    archs
        What its kernels are compiled for, if nvcc is found: numbers separated by commas,
        ``release``, or ``off`` for none.
    jobs
        Compilers at a time.
    """
    # setuptools packs whatever an earlier build left there, of modules that are gone too
    for stale in (root / "build/lib", *root.glob("turbokv*.egg-info"), *root.glob("build/bdist.*")):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in dist.glob("turbokv-*.whl"):  # of before the distribution's name was turbokv-cache
        stale.unlink()
    settings = ["cuda=off"] if archs == "off" else ["cuda=auto", f"archs={archs}", f"jobs={jobs}"]
    # Not isolated: PyTorch, whose headers are needed, is large and installed already.
    options = ["--no-isolation", *(f"-C{setting}" for setting in settings)]
    built = _python_build(root, root / "build" / "forks" / "turbokv", "turbokv", options, {})
    file, content, version = identity(root)
    return _restamp(built, dist, version, {f"turbokv/{file}": content})


def has_kernels(wheel: Path) -> bool:
    """Whether turbokv's wheel carries CUDA kernels; one without nvcc still has a CPU library."""
    with zipfile.ZipFile(wheel) as opened:
        return _KERNELS in opened.namelist()


def build_flashinfer(fork: Fork, dist: Path) -> Path:
    """Build FlashInfer's wheel with its own back end, from patched sources.

    That back end runs pip in the Python that runs it. In an isolated environment there is none.
    """
    tree = fork.folder / "source"
    unpack(fork, tree)
    apply_patches(fork, tree)
    for name, path in _additions(fork, lambda name: (tree / name).exists()).items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tree / name)
    # An sdist has this file, a checkout makes it: only if it is missing.
    (tree / "flashinfer" / "_build_meta.py").write_text(
        '"""Build metadata for flashinfer package."""\n'
        f'__version__ = "{fork.version}"\n__git_version__ = "{fork.fields["commit"]}"\n'
    )
    constraints = fork.folder / "constraints.txt"
    constraints.write_text("".join(f"{pin}\n" for pin in _FLASHINFER_BUILD))
    # BUILD_NVEP makes that back end download and compile more
    environment = {"PIP_CONSTRAINT": str(constraints), "BUILD_NVEP": "0"}
    built = _python_build(tree, fork.folder / "wheel", "flashinfer", [], environment)
    file, content, _ = identity(fork.root)
    added = {f"flashinfer/{file}": content}
    return _restamp(built, dist, fork.version, added, requires=(requirement(fork.root),))


def build_vllm(fork: Fork, dist: Path) -> Path:
    """Put patched and added files into upstream's wheel: its libraries stay as they are."""
    tree = fork.folder / "source"
    unpack(fork, tree)
    apply_patches(fork, tree)
    source = download(fork)
    changes = {name: (tree / name).read_bytes() for name in patched_paths(fork)}
    with zipfile.ZipFile(source) as wheel:
        present = set(wheel.namelist())
        text = wheel.read("vllm/_version.py").decode()
    added = _additions(fork, present.__contains__)
    changes |= {name: path.read_bytes() for name, path in added.items()}
    parts = ", ".join([*fork.fields["version"].split("."), repr(fork.fields["local"])])
    text = re.sub(r"(version = )'[^']*'", rf"\g<1>'{fork.version}'", text)
    text = re.sub(r"(version_tuple = )\([^)]*\)", rf"\g<1>({parts})", text)
    changes["vllm/_version.py"] = text.encode()
    file, content, _ = identity(fork.root)
    changes[f"vllm/{file}"] = content
    flashinfer = Fork.load("flashinfer", fork.root)
    pin = f"flashinfer-python=={flashinfer.fields['version']}"
    return _restamp(
        source,
        dist,
        fork.version,
        changes,
        requires=(requirement(fork.root),),
        replaces={pin: f"flashinfer-python=={flashinfer.version}"},
    )


def _additions(fork: Fork, exists: Callable[[str], bool]) -> dict[str, Path]:
    """Return :func:`overlay`, none of which may replace a file of upstream's."""
    added = overlay(fork)
    if taken := sorted(filter(exists, added)):
        raise ForkError(
            f"{fork.name}: wanted names for shims and sources that {fork.fields['package']}"
            f" {fork.fields['version']} does not use, got {', '.join(taken)}"
        )
    return added


def _python_build(
    source: Path, out: Path, name: str, options: list[str], environment: dict[str, str]
) -> Path:
    """Run ``python -m build`` and return the wheel; what it printed is kept beside it."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), *options]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLASHINFER_")}
    log = out / "build.log"
    with log.open("w") as file:
        done = subprocess.run(
            [*command, str(source)],
            env={**clean, "SOURCE_DATE_EPOCH": _EPOCH, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise ForkError(
            f"{name}: its build failed; the end of {log} (without a network, its build requirements"
            f" could not be installed):\n{log.read_text()[-3000:]}"
        )
    return next(out.glob("*.whl"))


def _restamp(
    source: Path,
    dist: Path,
    version: str,
    changes: dict[str, bytes],
    *,
    requires: tuple[str, ...] = (),
    replaces: dict[str, str] | None = None,
) -> Path:
    """Write a wheel to ``dist`` with another version, changed members and requirements.

    Returns
    -------
    Path
        The wheel; others of the same distribution are removed from ``dist``.
    """
    name, old, tags = source.name.removesuffix(".whl").split("-", 2)
    info, new_info = f"{name}-{old}.dist-info/", f"{name}-{version}.dist-info/"
    with zipfile.ZipFile(source) as wheel:
        head, _, body = wheel.read(info + "METADATA").decode().partition("\n\n")
    lines = head.split("\n")
    swaps = {f"Version: {old}": f"Version: {version}"}
    swaps |= {f"Requires-Dist: {a}": f"Requires-Dist: {b}" for a, b in (replaces or {}).items()}
    for wanted in swaps:
        if lines.count(wanted) != 1:
            raise ForkError(f"{source.name}: METADATA: wanted {wanted!r} once, got {head}")
    lines = [swaps.get(line, line) for line in lines]
    lines += [f"Requires-Dist: {text}" for text in requires]
    metadata = "\n".join(lines) + "\n\n" + body
    target = dist / f"{name}-{version}-{tags}.whl"
    for other in dist.glob(f"{name}-*.whl*"):
        if other != target:
            other.unlink()
    rewrite(source, target, {**changes, new_info + "METADATA": metadata.encode()}, {info: new_info})
    return target
