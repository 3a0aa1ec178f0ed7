# SPDX-License-Identifier: Apache-2.0
"""The binding without a GPU: what the library needs, that it loads, and what callers are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from turbokv import TurboKVCodec, centring, core, doctor, kernels, paged
from turbokv.core import Codebook, VectorFormat
from turbokv.integrations.vllm import CACHE_DTYPES
from turbokv.kernels import BackendUnavailableError, cuda
from turbokv.kernels.cuda import build, jit, library, ops
from turbokv.kernels.cuda.build import Variant

ROOT = Path(__file__).resolve().parent.parent


def formats(
    head_dim: int = 128, k_bits: int = 4, v_bits: int = 3
) -> tuple[VectorFormat, VectorFormat]:
    codec = TurboKVCodec(head_dim, k_bits=k_bits, v_bits=v_bits)
    return codec.vector_format("k"), codec.vector_format("v")


# --- what is built --------------------------------------------------------------------------------


def test_variants_have_names_of_their_own() -> None:
    chosen = build.variants()
    assert len({variant.name for variant in chosen}) == len(chosen)
    assert Variant("decode", 128, 5, 3) in chosen
    assert Variant("store", 64) in chosen
    assert chosen[0].kind == "decode"  # what takes longest is started first
    assert Variant("decode", 64, 2, 2, True).name == "turbokv_decode_p64_k2v2_lookup2"


def test_every_cache_dtype_of_servers_is_compiled_ahead_of_time() -> None:
    assert set(build.PAIRS) == set(CACHE_DTYPES.values())
    assert len(build.PAIRS) == len(CACHE_DTYPES)
    chosen = set(build.variants())
    for k_bits, v_bits in CACHE_DTYPES.values():
        assert {Variant("decode", dim, k_bits, v_bits) for dim in (64, 128, 256)} <= chosen


@pytest.mark.parametrize("archs", [["8"], ["sm_80"], ["90b"], [""], []])
def test_odd_architectures_are_refused(archs: list[str]) -> None:
    with pytest.raises(ValueError, match="archs: wanted"):
        build.check_archs(archs)


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("90a", (9, 1), False),
        ("100", (10, 3), True),
        ("120", (12, 1), True),
    ],
)
def test_code_runs_on_later_minors(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert library._runs(arch, *capability) is runs


def test_a_release_runs_on_what_doctor_promises() -> None:
    for capability in doctor.COMPILED_FOR:
        assert any(library._runs(arch, *capability) for arch in build.RELEASE_ARCHS)


def test_constants_are_those_of_pages() -> None:
    assert ops.SEGMENT == centring.SEGMENT
    assert paged.TILE == ops._TILE
    assert paged.PAGE_BITS == ops._PAGE_BITS
    assert paged.MIN_PADDED_DIM == ops._MIN_PADDED_DIM


def test_the_wheel_s_tag_follows_from_the_symbols(tmp_path: Path) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel", reason="wanted setuptools 70.1 or newer")
    sys.path.insert(0, str(ROOT))
    try:
        import build_backend
    finally:
        sys.path.remove(str(ROOT))
    machine = os.uname().machine
    for names, tag in [
        (b"\0GLIBC_2.2.5\0GLIBC_2.17\0GLIBCXX_3.4.9\0", "manylinux_2_28"),
        (b"\0GLIBC_2.28\0GLIBCXX_3.4.26\0", "manylinux_2_31"),
        (b"\0GLIBC_2.34\0GLIBCXX_3.4.29\0", "manylinux_2_34"),
        (b"\0GLIBC_2.99\0", "linux"),
    ]:
        path = tmp_path / "lib.so"
        path.write_bytes(names)
        assert build_backend.platform_tag(path) == f"{tag}_{machine}"


# --- formats --------------------------------------------------------------------------------------


def test_a_format_is_text_that_says_every_bit() -> None:
    fmt = VectorFormat.create("v", 96, Codebook.gaussian(3), scale_rule="least_squares")
    head_dim, bits, rule, frac_bits, step, magnitudes, signs = library.format_text(fmt).split()
    assert (head_dim, bits, rule, frac_bits) == ("96", "3", "2", "5")
    assert float.fromhex(step) == fmt.codebook.step
    assert tuple(map(int, magnitudes.split(","))) == fmt.codebook.magnitudes
    words = [int(word, 16) for word in signs.split(",")]
    for j, sign in enumerate(core.rotation_signs("v", 96).tolist()):
        assert (words[j // 32] >> (j % 32) & 1) == (sign < 0)
    assert words[4:] == [0] * 12


def test_only_uniform_two_bit_codebooks_need_no_lookup() -> None:
    for magnitudes, lookup in [((1, 3), False), ((5, 15), False), ((4, 13), True)]:
        book = Codebook(2, magnitudes, 0.1, 3)
        fmt = VectorFormat.create("k", 64, book, scale_rule="unbiased")
        assert ops._lookup2(fmt) is lookup


# --- arguments ------------------------------------------------------------------------------------


def decode_arguments() -> dict[str, Any]:
    """Arguments of decode on a pretended GPU."""
    k_format, v_format = formats()
    layout = paged.PageLayout(128, 4, 3, 32, 2)
    on = dict(device="cuda")
    return dict(
        q=torch.empty(3, 8, 128, dtype=torch.float16, **on),
        pages=torch.empty(layout.shape(9), dtype=torch.uint8, **on),
        k_format=k_format,
        v_format=v_format,
        page_size=32,
        kv_indices=torch.empty(3, 5, dtype=torch.int32, **on),
        kv_lens=torch.empty(3, dtype=torch.int32, **on),
        num_ctas=4,
    )


def store_arguments() -> dict[str, Any]:
    shared = {k: v for k, v in decode_arguments().items() if k.endswith(("format", "s", "size"))}
    on = dict(device="cuda")
    return dict(
        k=torch.empty(7, 2, 128, **on),
        v=torch.empty(7, 2, 128, **on),
        slot_mapping=torch.empty(7, dtype=torch.int64, **on),
        **{k: shared[k] for k in ("pages", "k_format", "v_format", "page_size")},
    )


def decompress_arguments() -> dict[str, Any]:
    decode = decode_arguments()
    on = dict(device="cuda")
    return dict(
        **{k: decode[k] for k in ("pages", "k_format", "v_format", "page_size")},
        kv_indices=torch.empty(5, dtype=torch.int32, **on),
        out_k=torch.empty(150, 2, 128, dtype=torch.bfloat16, **on),
        out_v=torch.empty(150, 2, 128, dtype=torch.bfloat16, **on),
    )


CALLS = {
    "decode": (cuda.decode, decode_arguments),
    "store": (cuda.store, store_arguments),
    "decompress": (cuda.decompress, decompress_arguments),
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.empty(shape, dtype=dtype, device="cuda")


I32, I64, U8, F16 = torch.int32, torch.int64, torch.uint8, torch.float16


@pytest.mark.parametrize(
    ("call", "name", "value", "error", "message"),
    [
        ("decode", "q", lambda: [1.0], TypeError, "q: wanted a torch.Tensor, got list"),
        ("decode", "q", empty(3, 8, 128, dtype=I32), TypeError, "q: wanted torch.float32 or"),
        ("decode", "q", empty(3, 8, 64), ValueError, r"q: wanted shape \['\*', '\*', 128\]"),
        ("decode", "q", empty(3, 7, 128), ValueError, "q: wanted a multiple of 2 heads, got 7"),
        ("decode", "q", empty(4, 8, 128), ValueError, "q: wanted 3 tokens"),
        ("decode", "q", lambda: torch.empty(3, 8, 128), ValueError, "q: wanted a CUDA tensor, got"),
        ("decode", "pages", empty(9, 2, 3, dtype=U8), ValueError, "pages: wanted shape"),
        (
            "decode",
            "pages",
            lambda: torch.empty_strided((9, 2, 32 * 116), (8000, 3720, 1), dtype=U8, device="cuda"),
            ValueError,
            "pages: wanted strides and a storage offset",
        ),
        ("decode", "page_size", lambda: 24, ValueError, "page_size: wanted a multiple of 16, got"),
        ("decode", "page_size", lambda: 32.0, TypeError, "page_size: wanted an int, got 32.0"),
        ("decode", "k_format", lambda: 4, TypeError, "k_format: wanted a VectorFormat, got int"),
        (
            "decode",
            "v_format",
            lambda: formats(64)[1],
            ValueError,
            "v_format: wanted head_dim 128, got 64",
        ),
        (
            "decode",
            "k_format",
            lambda: formats(128, 6)[0],
            ValueError,
            r"k_format: wanted one of \(2, 3, 4, 5, 8\) bits",
        ),
        ("decode", "kv_indices", empty(3, 5, dtype=I64), TypeError, "kv_indices: wanted torch.int"),
        ("decode", "kv_lens", lambda: None, ValueError, "kv_lens: wanted a tensor"),
        ("decode", "kv_lens", empty(2, dtype=I32), ValueError, r"kv_lens: wanted shape \[3\]"),
        ("decode", "kv_last_page_len", empty(2, dtype=I32), ValueError, "kv_last_page_len: wanted"),
        ("decode", "qo_indptr", empty(3, dtype=I32), ValueError, r"qo_indptr: wanted shape \[4\]"),
        ("decode", "max_q_len", lambda: 0, ValueError, "max_q_len: wanted 1 to"),
        ("decode", "window_left", lambda: -2, ValueError, "window_left: wanted -1 to"),
        ("decode", "logits_soft_cap", lambda: -1.0, ValueError, "logits_soft_cap: wanted 0 or"),
        ("decode", "body", lambda: "tma", ValueError, r"body: wanted one of \('auto'"),
        ("decode", "sinks", empty(2), ValueError, r"sinks: wanted shape \[8\]"),
        ("decode", "out", empty(3, 8, 64), ValueError, "out: wanted shape"),
        ("decode", "lse", empty(8, 3), ValueError, r"lse: wanted shape \[3, 8\]"),
        ("decode", "k_offset", empty(2, 2, 64), ValueError, "k_offset: wanted shape"),
        (
            "decode",
            "k_offset",
            lambda: empty(2 * 2 * 128 + 1)().as_strided((2, 2, 128), (256, 128, 1), 1),
            ValueError,
            "k_offset: wanted strides and a storage offset",
        ),
        ("decode", "tile_slots", empty(9, 2, dtype=I32), ValueError, "window: wanted a tensor"),
        (
            "decode",
            "window",
            empty(4, 2, 2, 16, 128, dtype=F16),
            ValueError,
            "tile_slots: wanted a tensor",
        ),
        ("decode", "workspace", empty(9), TypeError, "workspace: wanted torch.uint8"),
        ("store", "v", empty(7, 2, 128, dtype=F16), TypeError, "v: wanted torch.float32, got"),
        ("store", "v", empty(6, 2, 128), ValueError, r"v: wanted shape \[7, 2, 128\]"),
        ("store", "slot_mapping", empty(6, dtype=I64), ValueError, "slot_mapping: wanted at least"),
        ("store", "slot_mapping", empty(7, dtype=I32), TypeError, "slot_mapping: wanted torch.int"),
        ("store", "k_offset", empty(1, 2, 128), ValueError, "positions: wanted a tensor"),
        ("store", "k_rotated", empty(7, 2, 128), TypeError, "k_rotated: wanted torch.float16 or"),
        ("store", "pages", empty(9, 3, 32 * 116, dtype=U8), ValueError, "pages: wanted shape"),
        ("decompress", "out_v", empty(149, 2, 128, dtype=torch.bfloat16), ValueError, "out_v: wan"),
        ("decompress", "out_k", empty(150, 2, 128), TypeError, "out_k: wanted torch.float16 or"),
        ("decompress", "first_token", lambda: 11, ValueError, "kv_indices: wanted pages for 161"),
        ("decompress", "kv_indices", empty(2, 9, dtype=I32), ValueError, "out_indptr: wanted a"),
        ("decompress", "k_offset", empty(0, 2, 128), ValueError, "k_offset: wanted 1 segments"),
    ],
)
def test_bad_arguments_are_named(
    call: str, name: str, value: Callable[[], Any], error: type[Exception], message: str
) -> None:
    function, arguments = CALLS[call]
    with FakeTensorMode(), pytest.raises(error, match=message):
        function(**{**arguments(), name: value()})


def test_formats_that_pages_cannot_hold_are_refused() -> None:
    small = TurboKVCodec(32).vector_format("k")
    wide = TurboKVCodec(64, norm_dtype=torch.float32).vector_format("k")
    with pytest.raises(ValueError, match=r"k_format: wanted head_dim of 33 or more"):
        cuda.prepare("store", small, small)
    with pytest.raises(ValueError, match=r"k_format: wanted norm_dtype torch.float16"):
        cuda.prepare("store", wide, wide)
    with pytest.raises(ValueError, match="kind: wanted"):
        cuda.prepare("encode", wide, wide)  # type: ignore[arg-type]


def test_workspace_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="num_qo_heads: wanted a multiple of num_kv_heads 3"):
        cuda.decode_workspace_bytes(1, 8, 3, 128)
    with pytest.raises(ValueError, match="head_dim: wanted 33 to 512"):
        cuda.decode_workspace_bytes(1, 8, 2, 32)


# --- without the library --------------------------------------------------------------------------


def test_a_library_that_is_not_built_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "absent.so")
    reason = kernels.why_unavailable("cuda", "cuda", "pages")
    assert reason is not None and "not built" in reason
    with FakeTensorMode(), pytest.raises(BackendUnavailableError, match="not built"):
        cuda.store(**store_arguments())
    with pytest.raises(BackendUnavailableError, match="not built"):
        cuda.decode_workspace_bytes(1, 8, 2, 128)


def test_a_library_that_does_not_load_is_said_not_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(library, "LIBRARY", path)
    with pytest.raises(BackendUnavailableError, match="does not load with PyTorch"):
        library.load()


def test_tensors_on_the_cpu_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = kernels.why_unavailable("cuda", "cpu", "pages")
    assert reason is not None and "need CUDA tensors, got device cpu" in reason


def test_the_flat_codec_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_unavailable", lambda device: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.why_unavailable("cuda", "cuda", "pages") is None
    with pytest.raises(BackendUnavailableError, match="store, decompress and decode of pages"):
        kernels.resolve_backend("cuda", "cuda")
    assert kernels.resolve_backend("auto", "cuda") != "cuda"
    assert kernels.resolve_backend("auto", "cuda", "pages") == "cuda"


def test_a_variant_without_nvcc_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"nvcc is not found.*install the CUDA toolkit"):
        jit.compile_variant(Variant("decode", 512, 8, 8), ["90a"])


def test_a_missing_variant_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # the compiler is pretended: only where files go and that they are kept is looked at
    made: list[str] = []

    def pretend(target: Path, variant: Variant, archs: list[str]) -> None:
        made.append(variant.name)
        target.write_bytes(b"")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "13.0")
    monkeypatch.setattr(build, "build_variant", pretend)
    variant = Variant("decode", 512, 8, 8)
    first = jit.compile_variant(variant, ["90a"])
    assert jit.compile_variant(variant, ["90a"]) == first
    assert jit.compile_variant(variant, ["80"]) != first
    assert made == [variant.name] * 2
    assert first.is_relative_to(tmp_path / "turbokv" / "kernels")


# --- the library, built small ---------------------------------------------------------------------

built = [
    pytest.mark.slow,
    pytest.mark.skipif(build.find_nvcc() is None, reason="wanted nvcc, found none"),
]


@pytest.fixture(scope="module")
def small_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library with the binding and one kernel, for one architecture."""
    folder = tmp_path_factory.mktemp("cuda")
    return build.build_library(
        folder / build.LIBRARY.name,
        folder=folder / "objects",
        archs=["90a"],
        chosen=[Variant("decompress", 64)],
        jobs=1,
    )


def run_with(path: Path, code: str) -> str:
    """Run code in a process of its own, where ``library`` is the built one: it loads only once."""
    setup = (
        "import pathlib, torch\n"
        "from turbokv import TurboKVCodec, kernels\n"
        "from turbokv.kernels import cuda\n"
        "from turbokv.kernels.cuda import library\n"
        f"library.LIBRARY = pathlib.Path({str(path)!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", setup + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def marked(test: Callable[..., None]) -> Callable[..., None]:
    for mark in built:
        test = mark(test)
    return test


@marked
def test_the_library_needs_only_stable_symbols(small_library: Path) -> None:
    listing = subprocess.run(
        ["nm", "-D", str(small_library)], capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        kind, name = line.split()[-2:]
        if kind in "Uw":
            # versioned: glibc, libstdc++ or libgcc; else PyTorch's C interface
            assert "@" in name or re.match(r"(aoti_)?torch_|_ITM_|__gmon_start__", name), line
            assert not re.search(r"c10|2at|caffe|Py[A-Z_]", name.split("@")[0]), line
        else:
            assert name.startswith("turbokv_"), line
    needed = subprocess.run(
        ["readelf", "-d", str(small_library)], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"NEEDED.*\[(.*?)\.so", needed)[0] == "libtorch_cpu"
    assert "libcudart" not in needed and "python" not in needed
    # only functions that the oldest PyTorch has are declared to the compiler
    assert "torch_new_stable_ivalue" not in listing
    assert str(ROOT).encode() not in small_library.read_bytes()


@marked
def test_the_library_loads_and_knows_itself(small_library: Path) -> None:
    out = run_with(
        small_library,
        "import json\n"
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "together = threading.Barrier(4)\n"
        "with ThreadPoolExecutor(4) as pool:  # the first calls come from several threads at once\n"
        "    futures = [pool.submit(lambda: (together.wait(), library.load())) for _ in range(4)]\n"
        "(loaded,) = {id(f.result()[1]): f.result()[1] for f in futures}.values()\n"
        "names = sorted(v.name for v in loaded.variants)\n"
        "print(json.dumps([loaded.archs, names, loaded.runtime]))\n"
        "assert 'PyTorch' in (kernels.why_unavailable('cuda', 'cuda', 'pages') or 'PyTorch')\n"
        "for name in ('store', 'decompress', 'decode', 'page_metadata'):\n"
        "    schema = getattr(torch.ops.turbokv, name).default._schema\n"
        "    assert not schema.returns and schema.is_mutable, schema\n",
    )
    archs, names, runtime = json.loads(out)
    assert (archs, names) == (["90a"], ["turbokv_decompress_p64"])
    assert runtime // 1000 == 13


@marked
def test_a_library_of_other_headers_is_refused(small_library: Path) -> None:
    out = run_with(
        small_library,
        "from turbokv.kernels.cuda import build\n"
        "build.sources_digest = lambda: 'of headers that changed since'\n"
        "print(kernels.why_unavailable('cuda', torch.device('cuda', 0), 'pages'))\n"
        "try:\n"
        "    library.load()\n"
        "except kernels.BackendUnavailableError as error:\n"
        "    print('refused:', error)\n",
    )
    assert out.count(f"{small_library} was built from other headers than those beside it") == 2
    assert "refused:" in out and "with nvcc, 'python -m turbokv.kernels.cuda'" in out


@marked
def test_a_library_cut_off_is_refused(small_library: Path, tmp_path: Path) -> None:
    cut = tmp_path / small_library.name
    for keep in (0, 40, 3000):
        cut.write_bytes(small_library.read_bytes()[:keep])
        out = run_with(
            cut,
            "try:\n"
            "    library.load()\n"
            "except kernels.BackendUnavailableError as error:\n"
            "    print('refused:', error)\n",
        )
        assert "refused:" in out and f"{cut} does not load with PyTorch" in out


@marked
def test_operators_refuse_tensors_on_the_cpu(small_library: Path) -> None:
    out = run_with(
        small_library,
        "library.load()\n"
        "ints = torch.zeros(2, dtype=torch.int32)\n"
        "try:\n"
        "    torch.ops.turbokv.page_metadata(ints, ints.view(2, 1), 4, ints, ints, ints)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n",
    )
    assert "seq_lens: wanted a CUDA tensor" in out


TRACED = """
from torch._subclasses import FakeTensorMode
library.Library.require = lambda self, variant: None  # nothing is compiled, as nothing is launched
codec = TurboKVCodec(64, k_bits=4)
k_format, v_format = codec.vector_format("k"), codec.vector_format("v")
cuda.prepare("store", k_format, v_format)

class Step(torch.nn.Module):
    def forward(self, pages, first, table, lens, slots, x, q, workspace):
        cuda.store(x, x, slots, pages, k_format, v_format, 16)
        old = torch.empty(144, 2, 64, dtype=x.dtype, device=x.device)
        cuda.decompress(pages, k_format, v_format, 16, first, old, None)
        out = cuda.decode(
            q, pages, k_format, v_format, 16, table, kv_lens=lens, workspace=workspace
        )
        return out, old

def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="cuda")

with FakeTensorMode(allow_non_fake_inputs=True):
    inputs = (
        empty(9, 2, 16 * 68, dtype=torch.uint8),
        empty(9, dtype=torch.int32),
        empty(7, 9, dtype=torch.int32),
        empty(7, dtype=torch.int32),
        empty(7, dtype=torch.int64),
        empty(7, 2, 64),
        empty(7, 8, 64),
        empty(1 << 20, dtype=torch.uint8),
    )
    if kind == "export":
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        shapes = (None, None, batch, batch, batch, batch, batch, None)
        program = torch.export.export(Step(), inputs, dynamic_shapes=shapes)
        program.run_decompositions({})
        print(program.graph)
    else:
        def backend(module, inputs):
            print(module.graph)
            return lambda *inputs: (torch.empty(1), torch.empty(1))

        torch.compile(Step(), fullgraph=True, dynamic=True, backend=backend)(*inputs)
"""


@marked
@pytest.mark.parametrize("kind", ["export", "compile"])
def test_operators_are_traced(small_library: Path, kind: str) -> None:
    """Whole, with symbolic sizes, and without running anything."""
    out = run_with(small_library, f"kind = {kind!r}\n{TRACED}")
    for name in ("store", "decompress", "decode"):
        assert len(re.findall(rf"turbokv.{name}\b", out)) == 1, out


@marked
def test_a_compiled_variant_joins_the_library(small_library: Path, tmp_path: Path) -> None:
    out = run_with(
        small_library,
        f"import os; os.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r}\n"
        "k, v = (TurboKVCodec(100).vector_format(role) for role in 'kv')\n"
        "cuda.prepare('decompress', k, v)\n"
        "print(sorted(each.name for each in library.load().variants))\n",
    )
    assert "turbokv_decompress_p128" in out
    assert len(list(tmp_path.rglob("turbokv_decompress_p128.so"))) == 1


@marked
def test_unchanged_objects_are_kept(small_library: Path) -> None:
    objects = small_library.parent / "objects"
    before = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    assert len(before) == 3
    build.build_library(
        small_library, folder=objects, archs=["90a"], chosen=[Variant("decompress", 64)], jobs=1
    )
    assert {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")} == before
