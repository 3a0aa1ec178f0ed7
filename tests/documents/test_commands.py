# SPDX-License-Identifier: Apache-2.0
"""Commands in documents exist, with their options: each is parsed by the program that it names."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.documents.snippets import ROOT, Block, blocks, commands, inline_commands
from turbokv import cli
from turbokv.integrations.vllm.dtypes import CACHE_DTYPES
from turbokv.integrations.vllm.options import Options
from turbokv.presets import PRESETS, preset_widths

SHELL = blocks("bash")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:(?!=)", MAKEFILE, re.MULTILINE))
TARGETS |= {"build-vllm", "build-flashinfer"}
LANGUAGES = {"bash", "python", "cpp", "text", "json", "yaml"}
OTHERS = {"pip", "git", "pre-commit"}  # programs whose options are not ours to check


class _Parsed(Exception):
    """The arguments of a script were understood."""


def check_turbokv(words: list[str], *, whole: bool = True) -> None:
    group: Any = typer.main.get_command(cli.app)
    if words[0].startswith("--"):
        assert words[0] == "--help" or words[0] in {
            name for parameter in group.params for name in parameter.opts
        }
        return
    try:
        context = group.commands[words[0]].make_context(words[0], list(words[1:]))
    except Exception as error:  # of typer's own click, which has no public name
        if whole or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise
        return  # an option named without its value
    presets = context.params.get("presets") or context.params.get("preset") or ""
    for name in presets.split(","):
        if name not in ("", "all", "short", "none", "full"):
            word = name.split("+")[0]
            assert preset_widths(word) is not None and (word in PRESETS or words[0] == "eval")


def check_make(words: list[str]) -> None:
    for word in words:
        assert "=" in word or word in TARGETS, word


def check_vllm(words: list[str]) -> None:
    assert words[0] == "serve"
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options.pop("--kv-cache-dtype") in CACHE_DTYPES
    extra = json.loads(options.pop("--additional-config", "{}")).get("turbokv", {})
    extra.pop("calibration", None)  # a file of the reader's
    Options.from_config({"turbokv": extra})
    assert set(options) <= {"--port"}


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script parse its arguments, and stop it there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        parse(parser, *given, **named)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    before = set(sys.modules)
    try:
        if words[0] == "-m":
            if words[1] == "turbokv":
                check_turbokv(words[2:] or ["--help"])
                return
            monkeypatch.setattr(sys, "argv", words[1:])
            with pytest.raises(_Parsed):
                runpy.run_module(words[1], run_name="__main__")
        else:
            monkeypatch.setattr(sys, "argv", words)
            monkeypatch.syspath_prepend(str(ROOT / Path(words[0]).parent))
            with pytest.raises(_Parsed):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and "/scripts/" in str(
                sys.modules[name].__file__
            ):
                del sys.modules[name]


def check(words: list[str], monkeypatch: pytest.MonkeyPatch, *, whole: bool = True) -> None:
    program, rest = words[0], words[1:]
    if program == "turbokv":
        check_turbokv(rest, whole=whole)
    elif program == "make":
        check_make(rest)
    elif program == "vllm":
        check_vllm(rest)
    elif program in ("python", "python3"):
        check_script(rest, monkeypatch)
    elif program == "docker":
        assert (ROOT / "compose.yaml").is_file() and (ROOT / "Dockerfile").is_file()
    else:
        assert program in OTHERS, program


def test_there_are_blocks() -> None:
    assert len(SHELL) > 12 and len({block.page for block in SHELL}) > 8


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_a_block_names_its_language(block: Block) -> None:
    assert block.language in LANGUAGES


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_understood(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(block):
        check(words, monkeypatch)


def test_commands_in_sentences_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inline_commands(("turbokv", "make", "python", "python3"))
    assert found
    for page, words in found:
        try:
            check(words, monkeypatch, whole=False)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {' '.join(words)}") from error
