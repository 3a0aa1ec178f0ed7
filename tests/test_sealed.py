# SPDX-License-Identifier: Apache-2.0
"""Sealed files: no damage goes unseen, and none is more than a ValueError that names the file.

Ten thousand damaged calibration files. The seed of each is its number, so that a failure can be had
again: ``damaged(example, number)``.
"""

from __future__ import annotations

import json
import pathlib
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from turbokv import Codebook
from turbokv.calibration import (
    FORMAT,
    Calibration,
    CalibrationError,
    Fingerprint,
    LayerCalibration,
)
from turbokv.centring import KeyOffsets, Rotary, rotary_frequencies
from turbokv.sealed import read_sealed, write_sealed

HEADS, DIM = 2, 8
CASES = 10_000


def calibration(shift: float = 0.0) -> Calibration:
    mu = torch.arange(HEADS * DIM, dtype=torch.float32).view(HEADS, DIM) + shift
    full = LayerCalibration(
        offsets=KeyOffsets(mu, Rotary(rotary_frequencies(DIM))),
        k_scale=mu + 1,
        v_shift=-mu,
        k_codebook=Codebook(3, (9, 30, 54, 90), 0.025, 5),
        k_spread=torch.ones(HEADS, dtype=torch.float32),
    )
    mark = Fingerprint("a" * 64, tuple(0.1 * i for i in range(4)), "tiny é")
    return Calibration(mark, {0: full, 5: LayerCalibration()}, {"from": 'a "text"'})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    for name, shift in (("one", 0.0), ("other", 1.0)):
        calibration(shift).save(folder / name)
    return (folder / "one").read_bytes(), (folder / "other").read_bytes()


# --- ways to damage a file ------------------------------------------------------------------------


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def truncate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def lengthen(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 40))


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The header of one file over the numbers of another, or cut anywhere."""
    at = header_end(data) if rng.random() < 0.5 else rng.randrange(1, len(data))
    return data[:at] + other[at:]


def claim(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Another length of the header, huge ones among them."""
    length = rng.choice((0, 1, 2**63, 2**64 - 1, 2**40, len(data), rng.randrange(2 * len(data))))
    return length.to_bytes(8, "little") + data[8:]


def numbers(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """NaN, infinity or a plausible number in the place of four bytes of a tensor."""
    value = rng.choice((float("nan"), float("inf"), 0.0, -1.0, 0.5))
    at = header_end(data) + 4 * rng.randrange((len(data) - header_end(data)) // 4)
    return data[:at] + struct.pack("<f", value) + data[at + 4 :]


def drop(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 16) :]


def swap(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Two pieces of a file in each other's place: the same bytes in another order."""
    size = rng.randrange(1, 32)
    a, b = sorted(rng.sample(range(0, len(data) - size, size), 2))
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def digits(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Another digit in the header: versions, sizes, offsets, codebooks."""
    places = [i for i in range(8, header_end(data)) if chr(data[i]).isdigit()]
    at = rng.choice(places)
    return data[:at] + str(rng.randrange(10)).encode() + data[at + 1 :]


Damage = Callable[[bytes, bytes, random.Random], bytes]
WAYS: list[Damage] = [flip, truncate, lengthen, splice, claim, numbers, drop, swap, digits]


def damaged(files: tuple[bytes, bytes], number: int) -> tuple[str, bytes]:
    """Return how file ``number`` is damaged, and its bytes, which are not those of ``files``."""
    rng = random.Random(number)
    way = WAYS[number % len(WAYS)]
    while (made := way(*files, rng)) in files:
        pass
    return way.__name__, made


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_damaged_file_is_taken(files: tuple[bytes, bytes], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "damaged.safetensors"
    refused: Counter[str] = Counter()
    for number in range(CASES):
        way, made = damaged(files, number)
        path.write_bytes(made)
        try:
            Calibration.load(path)
        except CalibrationError as error:
            assert "calibration: wanted" in str(error) and str(path) in str(error), (number, error)
            refused[way] += 1
        except BaseException as error:  # a panic of the reader below is none of Exception's
            pytest.fail(f"damaged(files, {number}), {way}: {error!r}")
        else:
            pytest.fail(f"damaged(files, {number}), {way}: taken")
    print(f"seeds 0 to {CASES - 1}:", dict(refused))
    assert sum(refused.values()) == CASES


def test_every_single_bit_is_under_the_seal(
    files: tuple[bytes, bytes], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "damaged.safetensors"
    whole = files[0]
    for at in range(len(whole)):
        made = bytearray(whole)
        made[at] ^= 1 << (at % 8)
        path.write_bytes(made)
        with pytest.raises(CalibrationError):
            Calibration.load(path)


def forged(rng: random.Random, files: tuple[bytes, bytes], folder: pathlib.Path) -> pathlib.Path:
    """Write a file whose header had a value changed before it was sealed."""
    source = folder / "source.safetensors"
    source.write_bytes(files[0])
    tensors, metadata = read_sealed(source)
    header = json.loads(metadata[FORMAT])
    strange: list[Any] = [None, True, -1, 10**400, 1.5, "x", [], {}, [[]], "NaN", {"a": 1}]
    where: Any = header
    while True:
        key = rng.choice(list(where) if isinstance(where, dict) else range(len(where)))
        deeper = where[key]
        if not isinstance(deeper, (dict, list)) or not deeper or rng.random() < 0.3:
            break
        where = deeper
    where[key] = rng.choice(strange)
    name = rng.choice(sorted(tensors))
    if rng.random() < 0.5:
        tensors[name] = rng.choice(
            [
                torch.full_like(tensors[name], float("nan")),
                tensors[name].to(torch.float16),
                tensors[name].flatten()[:3],
                torch.zeros((0, 4), dtype=torch.float32),
                tensors[name] - 3,
            ]
        )
    made = folder / "forged.safetensors"
    write_sealed(made, "made", tensors, {FORMAT: json.dumps(header)})
    return made


def test_sealed_nonsense_is_refused_or_a_calibration(
    files: tuple[bytes, bytes], tmp_path: pathlib.Path
) -> None:
    """Whoever seals anew may write anything: what is read is sound, or refused by name."""
    taken = 0
    for number in range(1000):
        path = forged(random.Random(number), files, tmp_path)
        try:
            read = Calibration.load(path)
        except CalibrationError as error:
            assert str(path) in str(error), number
        except BaseException as error:
            pytest.fail(f"forged(Random({number})): {error!r}")
        else:
            taken += 1
            for layer in read.layers.values():
                for tensor in (layer.k_scale, layer.v_shift, layer.k_spread):
                    assert tensor is None or bool(tensor.isfinite().all()), number
    assert taken < 200


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '"\\ud800"'])
def test_headers_that_overwhelm_readers_are_refused(text: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep.safetensors"
    one = {"0.mu": torch.zeros(2, 4, dtype=torch.float32)}
    write_sealed(path, "path", one, {FORMAT: text})
    with pytest.raises(CalibrationError, match=r"deep\.safetensors"):
        Calibration.load(path)
    raw = text.encode("utf-8", "surrogatepass")
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CalibrationError, match=r"deep\.safetensors"):
        Calibration.load(path)


def test_files_of_version_1_are_read(tmp_path: pathlib.Path) -> None:
    """They have no seal; what can be told is told."""
    path = tmp_path / "old.safetensors"
    mu = torch.ones(2, 4, dtype=torch.float32)
    header = {
        "format": FORMAT,
        "version": 1,
        "fingerprint": {"config_sha256": "a", "sketch": [0.5], "name": "old"},
        "source": {"text": "help"},
        "layers": {"0": {"interleaved": False}, "2": {}},
    }
    tensors = {"0.mu": mu, "0.inv_freq": torch.ones(2, dtype=torch.float64)}
    path.write_bytes(save(tensors, {FORMAT: json.dumps(header)}))
    read = Calibration.load(path)
    assert sorted(read.layers) == [0, 2] and read.source == {"text": "help"}
    assert read.layers[0].offsets is not None and torch.equal(read.layers[0].offsets.mu, mu)
    tensors["0.mu"] = mu * float("nan")
    path.write_bytes(save(tensors, {FORMAT: json.dumps(header)}))
    with pytest.raises(CalibrationError, match=r"0\.mu' holds NaN or infinities"):
        Calibration.load(path)


def test_numbers_that_cannot_be_read_are_not_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.safetensors"
    layer = LayerCalibration(v_shift=torch.full((2, 4), float("nan"), dtype=torch.float32))
    with pytest.raises(ValueError, match=r"calibration: wanted .* '3\.v_shift' holds NaN"):
        Calibration(Fingerprint("ab", ()), {3: layer}).save(path)
    assert not list(tmp_path.iterdir())


# --- what is written ------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    """A real one: the process may write no file beyond a few bytes."""
    path = tmp_path / "c.safetensors"
    calibration().save(path)
    before = path.read_bytes()
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.test_sealed import calibration\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n    calibration(1).save(sys.argv[1])\n"
        "except OSError as error:\n    print(error)\n"
    )
    root = str(pathlib.Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), root], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout and str(path) in done.stdout
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    """SIGKILL between any two system calls: what is at the path is one of the two files, whole."""
    path = tmp_path / "c.safetensors"
    calibration().save(path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.test_sealed import calibration\n"
        "made = [calibration(0), calibration(1)]\n"
        "print('begin', flush=True)\n"
        "while True:\n    [one.save(sys.argv[1]) for one in made]\n"
    )
    root = str(pathlib.Path(__file__).parents[1])
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path), root], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "begin\n"
        try:
            process.wait(rng.random() / 4)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        Calibration.load(path)
