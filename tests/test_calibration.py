# SPDX-License-Identifier: Apache-2.0
"""Calibration files, channel statistics and fitted codebooks."""

from __future__ import annotations

import json
import pathlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from turbokv import Codebook, TurboKVCodec
from turbokv.calibrate_online import OnlineCalibrator
from turbokv.calibrate_static import StaticCalibrator, random_ids
from turbokv.calibration import (
    FORMAT,
    VERSION,
    Calibration,
    CalibrationError,
    Fingerprint,
    LayerCalibration,
    architecture_sha256,
)
from turbokv.centring import KeyOffsets, Rotary, rotary_frequencies
from turbokv.key_map import KeyMap
from turbokv.sealed import read_sealed, write_sealed

HEADS, DIM = 2, 64


def fingerprint(shift: float = 0.0, arch: str = "a" * 64) -> Fingerprint:
    return Fingerprint(arch, tuple(0.1 * i + shift for i in range(64)), "tiny")


def example() -> Calibration:
    mu = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    full = LayerCalibration(
        offsets=KeyOffsets(mu, Rotary(rotary_frequencies(DIM), interleaved=True)),
        k_scale=torch.rand(HEADS, DIM, dtype=torch.float32) + 0.5,
        v_scale=torch.rand(HEADS, DIM, dtype=torch.float32) + 0.5,
        v_shift=torch.randn(HEADS, DIM, dtype=torch.float32),
        k_codebook=Codebook(3, (9, 30, 54, 90), 0.025, 5),
        k_spread=torch.rand(HEADS, dtype=torch.float32) + 1,
    )
    return Calibration(fingerprint(), {0: full, 5: LayerCalibration()}, {"from": "text"})


def test_saved_file_comes_back_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.safetensors"
    want = example()
    want.save(path)
    got = Calibration.load(path, fingerprint=fingerprint())
    assert got.fingerprint == want.fingerprint and got.source == want.source
    assert set(got.layers) == {0, 5} and got.layer(5) is not None and got.layer(1) is None
    a, b = want.layers[0], got.layers[0]
    assert a.offsets is not None and b.offsets is not None
    assert torch.equal(a.offsets.mu, b.offsets.mu) and b.offsets.rotary.interleaved
    assert torch.equal(a.offsets.at(0, 700), b.offsets.at(0, 700))
    for name in ("k_scale", "v_scale", "v_shift", "k_spread"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert a.k_codebook == b.k_codebook and b.v_codebook is None
    assert list(tmp_path.iterdir()) == [path]  # no partial file stays


def mapped() -> Calibration:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(HEADS, DIM, DIM, generator=generator, dtype=torch.float32)
    offsets = KeyOffsets(
        torch.ones(HEADS, DIM, dtype=torch.float32), Rotary(rotary_frequencies(DIM))
    )
    layers = {3: LayerCalibration(offsets=offsets, k_map=KeyMap(matrix))}
    return Calibration(fingerprint(), layers, {})


def test_a_key_map_comes_back_from_its_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.safetensors"
    want = mapped()
    want.save(path)
    got = Calibration.load(path)
    a, b = want.layers[3].k_map, got.layers[3].k_map
    assert a is not None and b is not None
    assert torch.equal(a.matrix, b.matrix) and torch.equal(a.inverse, b.inverse)
    assert got.without("k_map").layers[3].k_map is None
    assert got.without("k_map").layers[3].offsets is not None
    assert got.keep("k_map").layers[3].k_map is not None


@pytest.mark.parametrize(
    ("tensors", "version", "message"),
    [
        ({"3.k_map": torch.ones(HEADS, DIM, DIM).float()}, VERSION, "an inverse"),
        ({"3.k_map": torch.full((HEADS, DIM, DIM), torch.nan).float()}, VERSION, "an inverse"),
        ({"3.k_map": torch.eye(DIM).float()}, VERSION, "heads, head_dim, head_dim"),
        ({"3.k_map": torch.eye(DIM).float().repeat(HEADS, 1, 1).half()}, VERSION, "torch.float32"),
        (
            {"3.k_map": torch.eye(DIM).float().repeat(HEADS + 1, 1, 1)},
            VERSION,
            "one number of heads",
        ),
        (
            {"3.k_map": torch.eye(DIM).float().repeat(HEADS, 1, 1)},
            2,
            "k_map: wanted none before version 3",
        ),
        (
            {
                "3.k_map": torch.eye(DIM).float().repeat(HEADS, 1, 1),
                "3.k_scale": torch.ones(HEADS, DIM).float(),
            },
            VERSION,
            "wanted none beside k_map",
        ),
    ],
)
def test_a_key_map_that_nothing_can_use_is_refused(
    tmp_path: pathlib.Path, tensors: dict[str, torch.Tensor], version: int, message: str
) -> None:
    path = tmp_path / "c.safetensors"
    mapped().save(path)
    stored, metadata = read_sealed(path)
    header = {**json.loads(metadata[FORMAT]), "version": version}
    write_sealed(path, "path", {**stored, **tensors}, {FORMAT: json.dumps(header)})
    with pytest.raises(CalibrationError, match=message):
        Calibration.load(path)


def test_files_of_the_version_without_maps_are_still_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.safetensors"
    example().save(path)
    stored, metadata = read_sealed(path)
    header = {**json.loads(metadata[FORMAT]), "version": 2}
    write_sealed(path, "path", stored, {FORMAT: json.dumps(header)})
    assert Calibration.load(path).layers[0].offsets is not None


def test_a_key_map_of_other_heads_is_refused_by_a_layer() -> None:
    layer = mapped().layers[3]
    layer.check(HEADS, DIM, DIM)
    with pytest.raises(ValueError, match=r"k_map: wanted shape|offsets: wanted shape"):
        layer.check(HEADS + 1, DIM, DIM)
    only = LayerCalibration(k_map=layer.k_map)
    with pytest.raises(ValueError, match=r"k_map: wanted shape \[3, 64, 64\], got \[2, 64, 64\]"):
        only.check(HEADS + 1, DIM, DIM)


def test_same_weights_in_another_dtype_are_the_same_model(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.safetensors"
    example().save(path)
    rounded = tuple(
        torch.tensor(fingerprint().sketch, dtype=torch.float32).bfloat16().float().tolist()
    )
    Calibration.load(path, fingerprint=Fingerprint("a" * 64, rounded))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (fingerprint(arch="b" * 64), "of this model, but its architecture hashes to aaaaaaaaaaaa"),
        (fingerprint(shift=0.5), "of this model, but the architecture is the same but the weights"),
    ],
)
def test_another_model_is_refused(tmp_path: pathlib.Path, other: Fingerprint, message: str) -> None:
    path = tmp_path / "c.safetensors"
    example().save(path)
    with pytest.raises(CalibrationError, match=message):
        Calibration.load(path, fingerprint=other)


@pytest.mark.parametrize("keep", [0, 7, 100, -8])
def test_truncated_file_is_refused(tmp_path: pathlib.Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    example().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CalibrationError, match="calibration: wanted a safetensors file, got"):
        Calibration.load(path)


def rewrite(path: pathlib.Path, change: object) -> None:
    """Save a file whose header went through ``change``."""
    header = {
        "format": FORMAT,
        "version": 1,  # the one that has no seal
        "fingerprint": {"config_sha256": "a", "sketch": [], "name": ""},
        "source": {},
        "layers": {"0": {"interleaved": False}},
    }
    header.update(change)  # type: ignore[call-overload]
    tensors = {
        "0.mu": torch.zeros(2, 4, dtype=torch.float32),
        "0.inv_freq": torch.zeros(2, dtype=torch.float64),
    }
    save_file(tensors, path, metadata={FORMAT: json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, f"wanted version 1 to {VERSION}, and it has 99, got .*c.safetensors"),
        ({"version": VERSION}, "wanted a seal since version 2 and none before"),
        ({"version": True}, "wanted version 1 to"),
        ({"version": "1"}, "wanted version 1 to"),
        ({"fingerprint": {}}, "wanted a complete header"),
        ({"layers": {"3": {"interleaved": False}}}, "wanted a complete header"),
        ({"layers": {"0": {"k_codebook": {"bits": 4}}}}, "wanted a complete header"),
        ({"layers": []}, "wanted a complete header"),
        ({"layers": {"00": {"interleaved": False}}}, "wanted their indices, got '00'"),
        ({"layers": {"0": {"interleaved": 0}}}, "interleaved: wanted true or false"),
        ({"layers": {"0": {"interleaved": False, "map": 1}}}, "wanted interleaved, k_codebook"),
        ({"layers": {}}, "wanted those of the header's layers, got .*'0.inv_freq', '0.mu'"),
        ({"format": "other"}, "format: wanted turbokv-calibration, got 'other'"),
        ({"more": 1}, "wanted format, version, fingerprint, source, layers, got"),
        ({"fingerprint": {"config_sha256": 1, "sketch": [], "name": ""}}, "wanted a string"),
        (
            {"fingerprint": {"config_sha256": "", "sketch": [float("nan")], "name": ""}},
            "wanted finite numbers, got NaN",
        ),
    ],
)
def test_damaged_headers_are_refused(
    tmp_path: pathlib.Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "c.safetensors"
    rewrite(path, change)
    with pytest.raises(CalibrationError, match=message):
        Calibration.load(path)


def test_foreign_and_missing_files_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2, dtype=torch.float32)}, path)
    with pytest.raises(CalibrationError, match="wanted a turbokv-calibration file"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError, match="calibration: wanted a file, got"):
        Calibration.load(tmp_path / "none.safetensors")


def test_codebooks_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="k_bits: wanted 3, the width of the calibrated codebook"):
        example().check_widths(4, 4)
    example().check_widths(3, 4)


def test_a_config_without_weights_is_compared_by_architecture(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.safetensors"
    example().save(path)
    Calibration.load(path, fingerprint=Fingerprint("a" * 64, ()))
    with pytest.raises(CalibrationError, match="its architecture hashes to aaaaaaaaaaaa"):
        Calibration.load(path, fingerprint=Fingerprint("b" * 64, ()))


def config(**changed: object) -> SimpleNamespace:
    fields = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return SimpleNamespace(**{**fields, **changed})


def test_architecture_is_the_same_however_its_config_is_written() -> None:
    want = architecture_sha256(config())
    assert architecture_sha256(config(head_dim=16, num_key_value_heads=4, vocab_size=9)) == want
    assert architecture_sha256(config(rope_parameters=None, rope_theta=1_000_000)) == want
    nested = SimpleNamespace(get_text_config=lambda decoder: config())
    assert architecture_sha256(nested) == want
    others = [
        config(num_key_value_heads=2),
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4}),
        config(num_hidden_layers=3),
    ]
    assert len({architecture_sha256(other) for other in others} | {want}) == 4


@pytest.mark.parametrize(
    ("k_bits", "left", "is_weak"),
    [(2, 0.85, False), (3, 0.9, True), (4, 0.9, False), (4, 0.95, True), (5, 0.97, False)],
)
def test_layers_are_weak_where_offsets_leave_most_of_the_energy(
    k_bits: int, left: float, is_weak: bool
) -> None:
    fast = Rotary(torch.full((DIM // 2,), 2.0, dtype=torch.float64))  # loses its mean altogether
    mu = torch.ones(HEADS, DIM)
    spread = torch.full((HEADS,), DIM * (1 - left) / left)
    layers = {
        3: LayerCalibration(offsets=KeyOffsets(mu, fast), k_spread=spread),
        4: LayerCalibration(offsets=KeyOffsets(mu, fast)),  # of an older file, without spread
    }
    calibration = Calibration(fingerprint(), layers)
    weak = calibration.weak_layers(k_bits)
    assert weak == ({3: pytest.approx(left, abs=0.01)} if is_weak else {})
    assert (calibration.weakness(k_bits) is not None) == is_weak


def test_keep_drops_the_other_parts() -> None:
    kept = example().keep("offsets").layers[0]
    assert kept.offsets is not None and kept.k_scale is None and kept.k_codebook is None
    with pytest.raises(ValueError, match="names: wanted some of"):
        example().keep("offset")


# --- channel statistics ---------------------------------------------------------------------------


def test_static_means_and_scales_do_not_compound() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(HEADS, DIM, generator=generator, dtype=torch.float32) * 5 + 0.1
    calibrator = StaticCalibrator()
    pieces = [
        torch.randn(HEADS, 500, DIM, generator=generator, dtype=torch.float32) * spread[:, None]
        for _ in range(4)
    ]
    for piece in pieces:
        calibrator.update(3, k=piece, k_pre=piece + 2, v=piece + 7, q=torch.ones_like(piece))
    whole = torch.cat(pieces, 1)
    for _ in range(2):  # asking twice gives the same
        torch.testing.assert_close(calibrator.k_mean(3), whole.mean(1) + 2, rtol=0, atol=1e-4)
        torch.testing.assert_close(calibrator.v_shift(3), whole.mean(1) + 7, rtol=0, atol=1e-4)
        want = spread.sqrt() / spread.sqrt().log().mean(-1, keepdim=True).exp()
        torch.testing.assert_close(calibrator.k_scale(3), want, rtol=0.1, atol=0)
        torch.testing.assert_close(calibrator.v_scale(3), want, rtol=0.1, atol=0)
    assert calibrator.layers() == [3]


def test_channel_scales_lower_the_score_error() -> None:
    generator = torch.Generator().manual_seed(2)
    spread = torch.rand(1, DIM, generator=generator, dtype=torch.float32).pow(4) * 10 + 0.05
    k = torch.randn(1, 2000, DIM, generator=generator, dtype=torch.float32) * spread
    q = torch.randn(1, 2000, DIM, generator=generator, dtype=torch.float32) / spread
    calibrator = StaticCalibrator()
    calibrator.update(0, k=k, q=q)
    scale = calibrator.k_scale(0)
    codec = TurboKVCodec(DIM, 4)
    plain = codec.decompress_k(*codec.compress_k(k)) - k
    scaled = codec.decompress_k(*codec.compress_k(k / scale)) * scale - k
    errors = [float((q @ e.transpose(1, 2)).square().mean()) for e in (plain, scaled)]
    assert errors[1] < 0.5 * errors[0]


def test_static_calibrator_names_what_is_missing() -> None:
    calibrator = StaticCalibrator()
    with pytest.raises(ValueError, match="layer: wanted collected v of layer 2, got none"):
        calibrator.v_shift(2)
    with pytest.raises(ValueError, match="tensors: wanted k, k_pre, v or q, got keys"):
        calibrator.update(0, keys=torch.zeros(1, 1, 4, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"k: wanted shape \[heads, tokens, head_dim\], got \[4\]"):
        calibrator.update(0, k=torch.zeros(4, dtype=torch.float32))


def test_random_ids_are_the_same_everywhere_and_leave_out_padding() -> None:
    plain = random_ids(SimpleNamespace(vocab_size=50), 2000)
    assert plain.shape == (1, 2000) and plain.min() == 0 and plain.max() == 49
    state = torch.get_rng_state()
    padded = random_ids(SimpleNamespace(vocab_size=50, pad_token_id=49), 2000)
    assert torch.equal(state, torch.get_rng_state())
    assert not (padded == 49).any() and torch.equal(padded[plain < 49], plain[plain < 49])


# --- fitted codebooks -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_fitted_codebook_of_gaussians_is_the_gaussian_one(bits: int) -> None:
    codec = TurboKVCodec(DIM, bits)
    calibrator = OnlineCalibrator(codec)
    generator = torch.Generator().manual_seed(0)
    # long vectors are close to Gaussian per coordinate only for large head_dim, so compare errors
    x = torch.randn(20_000, DIM, generator=generator, dtype=torch.float32)
    calibrator.collect(0, x, x)
    fitted = TurboKVCodec(DIM, bits, k_codebook=calibrator.codebook(0, "k"))
    errors = []
    for one in (codec, fitted):
        got = one.decompress_k(*one.compress_k(x))
        errors.append(float((got - x).square().mean()))
    assert errors[1] < 1.01 * errors[0]


def test_fitted_codebook_adapts_to_heavy_tails() -> None:
    codec = TurboKVCodec(DIM, 3, v_scale_rule="least_squares")
    generator = torch.Generator().manual_seed(0)
    heavy = torch.randn(20_000, DIM, generator=generator, dtype=torch.float32).pow(3)
    # values are given so that their rotation is heavy-tailed
    x = codec.unrotate_output(heavy)
    calibrator = OnlineCalibrator(codec)
    calibrator.collect(0, x, x)
    fitted = TurboKVCodec(DIM, 3, v_codebook=calibrator.codebook(0, "v"))
    errors = [
        float((one.decompress_v(*one.compress_v(x)) - x).square().mean()) for one in (codec, fitted)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_codebooks_need_enough_data_and_a_lattice_width() -> None:
    calibrator = OnlineCalibrator(TurboKVCodec(DIM, 4))
    calibrator.collect(
        0, torch.randn(10, DIM, dtype=torch.float32), torch.randn(10, DIM, dtype=torch.float32)
    )
    with pytest.raises(ValueError, match=r"wanted at least 10000 k coordinates .* got 640"):
        calibrator.codebook(0, "k")
    with pytest.raises(ValueError, match="bits: wanted one of"):
        calibrator.codebook(0, "k", bits=7)
