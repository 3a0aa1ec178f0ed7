# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all."""

from __future__ import annotations

import os
import pathlib
import stat

import pytest
import torch

from turbokv.calibration import Calibration, Fingerprint, LayerCalibration
from turbokv.files import check_library, check_writable, written_whole


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "a.txt"
    with written_whole(target, "output") as fresh:
        assert (fresh.parent, fresh.suffix) == (tmp_path, ".txt")
        fresh.write_text("half")
        assert not target.exists()
    assert target.read_text() == "half" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_writer_leaves_the_old_file(
    tmp_path: pathlib.Path, error: type[BaseException]
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), written_whole(target, "output") as fresh:
        fresh.write_text("new, but not all of it")
        raise error
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_permissions_are_the_old_file_s_or_the_umask_s(tmp_path: pathlib.Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        for target in (old, new):
            with written_whole(target, "output") as fresh:
                fresh.write_text("x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (old, new)] == [0o640, 0o640]


def test_links_stay_links(tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    with written_whole(link, "output") as fresh:
        fresh.write_text("x")
    assert link.is_symlink() and target.read_text() == "x"


def test_what_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"output: wanted a file .*no folder .*missing"):
        check_writable(tmp_path / "missing" / "a", "output")
    with pytest.raises(ValueError, match=r"plot: wanted a file .*\(not a plain file\)"):
        check_writable(tmp_path, "plot")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="no folder"):
        check_writable(tmp_path / "file" / "a", "output")


def test_a_calibration_that_cannot_be_written_leaves_the_old_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    layer = LayerCalibration(v_shift=torch.ones(2, 4, dtype=torch.float32))
    made = Calibration(Fingerprint("ab", (0.5,)), {0: layer})
    made.save(path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turbokv.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        made.save(path)
    assert path.read_bytes() == before and names(tmp_path) == ["c.safetensors"]


def test_a_library_cut_off_is_told_from_a_whole_one(tmp_path: pathlib.Path) -> None:
    whole = pathlib.Path(torch._C.__file__)
    check_library(whole)
    cut = tmp_path / "cut.so"
    content = whole.read_bytes()
    for keep in (0, 20, 64, 3000, len(content) // 2):
        cut.write_bytes(content[:keep])
        with pytest.raises(OSError, match=f"it has {keep} bytes.* it is cut off"):
            check_library(cut)
    cut.write_text("not a library of Linux's" * 9)  # what loads it says what it is
    check_library(cut)
