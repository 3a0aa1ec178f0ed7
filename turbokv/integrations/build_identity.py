# SPDX-License-Identifier: Apache-2.0
"""Which kernels and which page format a build of TurboKV or of an engine fork carries.

A page written by one package is read by another, so all wheels of a build carry the sha256 of the
CUDA headers and of FORMAT.md, and a fork that meets another turbokv refuses to be imported. The
standard library suffices here: builds load this file by its path.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path

# What is installed: the plain name on the package index is another project's.
DISTRIBUTION = "turbokv-cache"
_PACKAGE = Path(__file__).resolve().parent.parent
# In every wheel, at the top of its package; constants only, so that it is read without an import.
FILE = "_turbokv_build.py"
_SOURCES = (".cuh", ".cu", ".h", ".jinja")
_FIELDS = ("TURBOKV_VERSION", "HEADERS_SHA256", "FORMAT_SHA256")


class BuildMismatchError(ImportError):
    """A fork was built with another turbokv than the one that is installed."""


def headers_sha256(package: Path = _PACKAGE) -> str:
    """Return the sha256 of all that forks compile: names and contents, in order.

    That is the header library, and what FlashInfer's modules add to it.
    """
    engine = package / "integrations" / "flashinfer"
    folders = (package / "kernels" / "cuda" / "include", engine / "include", engine / "csrc")
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in _SOURCES:
                content = path.read_bytes()
                name = path.relative_to(package).as_posix()
                digest.update(f"{name}\0{len(content)}\0".encode())
                digest.update(content)
    return digest.hexdigest()


def format_sha256(package: Path = _PACKAGE) -> str:
    """Return the sha256 of a package folder's FORMAT.md."""
    return hashlib.sha256((package / "FORMAT.md").read_bytes()).hexdigest()


def version(package: Path = _PACKAGE) -> str:
    """Return ``__version__`` of a package folder without importing it."""
    return _constants(package / "__init__.py", ("__version__",))["__version__"]


def identity(package: Path = _PACKAGE) -> dict[str, str]:
    """Return what the wheels of a build have in common."""
    return dict(
        zip(
            _FIELDS,
            (version(package), headers_sha256(package), format_sha256(package)),
            strict=True,
        )
    )


def wheel_version(fields: Mapping[str, str]) -> str:
    """Return the version that forks require exactly: a local one, from headers and format."""
    text = fields["HEADERS_SHA256"] + fields["FORMAT_SHA256"]
    return f"{fields['TURBOKV_VERSION']}+h{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def render(fields: Mapping[str, str]) -> str:
    """Return the text of :data:`FILE`."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        '"""Which turbokv this package was built with; written by the build."""',
        "",
        *(f'{name} = "{fields[name]}"' for name in _FIELDS),
    ]
    return "\n".join(lines) + "\n"


def _constants(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id in names:
                    found[target.id] = str(node.value.value)
    missing = sorted(set(names) - set(found))
    if missing:
        raise BuildMismatchError(f"{path.name}: wanted {', '.join(missing)}, found none")
    return found


def check(fork: str, distribution: str) -> None:
    """Raise unless an installed fork was built with this turbokv.

    Parameters
    ----------
    fork
        Its package, such as ``vllm``; it is found but not imported.
    distribution
        Its name on the package index. A version without ``+turbokv`` is upstream's with hooks put
        on by hand, which carries nothing to compare.

    Raises
    ------
    BuildMismatchError
        Naming what differs and what to do.
    """
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return
    if "+turbokv" not in installed:
        return
    spec = importlib.util.find_spec(fork)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    paths = [Path(folder) / FILE for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise BuildMismatchError(
            f"{distribution} {installed}: wanted {FILE} in the package, found none; reinstall it"
        )
    theirs, ours = _constants(path, _FIELDS), identity()
    differing = [name for name in _FIELDS if theirs[name] != ours[name]]
    if differing:
        name = differing[0]
        raise BuildMismatchError(
            f"{distribution} {installed} was built with another turbokv: {name} there is"
            f" {theirs[name][:16]}, here {ours[name][:16]}. Run `make build-all` and `pip install"
            " --force-reinstall --no-deps` with all wheels of dist/."
        )
