# SPDX-License-Identifier: Apache-2.0
"""vLLM's real engine over compressed pages, against itself with a 16-bit cache.

On a GPU these run our kernels in CUDA graphs, on a CPU the same schedules over the reference in
PyTorch. Each test is a schedule that some compressed cache gets wrong.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.vllm import engine as e
from tests.vllm import models
from turbokv.integrations.vllm.window.pool import live_windows

if (reason := e.why_no_engine()) is not None:
    pytest.skip(reason, allow_module_level=True)

CPU = e.on_cpu()
if not CPU:
    pytestmark = pytest.mark.gpu

gpu_only = pytest.mark.skipif(CPU, reason="needs a GPU")
# Widths whose error is small beside what a lost or doubled token does to a random model.
KV = "tq_k5v4"
# No token in 16 bits: every answer then comes from codes.
BARE = {"window": 0, "sinks": 0}
# Mean error of the five best logprobs, in nats. Widths alone cost 0.035 on these models; other
# tokens in the place of 16 older ones cost 0.13, in the place of half of them 0.6.
TOLERANCE = 0.08
LONG, TOKENS = (300, 6) if CPU else (1500, 12)
BATCH = 64 if CPU else 512


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("models")


# vLLM's CPU engine has the V2 runner from 0.33 on.
RUNNERS = ["V1", "V2"] if not CPU or e.has_v2_runner_on_cpu() else ["default"]


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of vLLM's model runners, which build what a step's metadata is made of differently."""
    if request.param != "default":
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(request.param == "V2")))
    return str(request.param)


both_runners = pytest.mark.usefixtures("runner")


@functools.cache
def reference_of(
    model: str, lengths: tuple[int, ...], seed: int, shared: int, max_tokens: int
) -> tuple[list[list[int]], list[e.Answer]]:
    requests = e.prompts(lengths, models.VOCAB, seed, shared)
    with run(model, "auto") as llm:
        return requests, e.ask(llm, requests, max_tokens)


@contextlib.contextmanager
def run(model: str, kv_cache_dtype: str = KV, **overrides: Any) -> Iterator[Any]:
    settings: dict[str, Any] = {"max_num_batched_tokens": BATCH, "max_model_len": 2 * LONG}
    if CPU:
        settings |= {
            "enforce_eager": True,
            "block_size": e.CPU_BLOCK,
            "kv_cache_memory_bytes": 1 << 28,
        }
    if kv_cache_dtype != "auto":
        settings["turbokv"] = BARE
    with e.engine(model, kv_cache_dtype, **(settings | overrides)) as llm:
        yield llm


def close(got: list[e.Answer], wanted: list[e.Answer], tolerance: float = TOLERANCE) -> None:
    found = e.compare(got, wanted)
    print(found)
    assert found.positions >= len(wanted)
    assert found.error < tolerance, found


KINDS = ["dense", "head64", "head96", "head256", "mixed"]


@both_runners
@pytest.mark.parametrize("kind", [*KINDS, pytest.param("hybrid", marks=gpu_only)])
def test_answers_are_those_of_a_16_bit_cache(kind: str, folder: pathlib.Path) -> None:
    model = models.make_tiny(kind, folder / kind)
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
    with run(model) as llm:
        close(e.ask(llm, requests, TOKENS), wanted)


@both_runners
def test_prefix_hits_of_mixed_lengths_in_one_batch(folder: pathlib.Path) -> None:
    model = models.make_tiny("dense", folder / "dense")
    lengths = (LONG, LONG // 2, LONG // 3, 90, 70)
    requests, wanted = reference_of(model, lengths, 1, 48, TOKENS)
    with run(model, enable_prefix_caching=True) as llm:
        # parts of some requests are cached, all of others, none of the last
        parts = [requests[0][:200], requests[1][:64], requests[2][: LONG // 3]]
        e.ask(llm, parts, 2)
        close(e.ask(llm, requests, TOKENS), wanted)
        again = e.ask(llm, requests, TOKENS)
        close(again, wanted)


@both_runners
def test_prefix_hits_keep_their_window(folder: pathlib.Path) -> None:
    model = models.make_tiny("dense", folder / "dense")
    lengths = (LONG, LONG // 2, LONG // 3, 90, 70)
    requests, wanted = reference_of(model, lengths, 1, 48, TOKENS)
    window = {"window": 128, "sinks": 4, "window_pool_fraction": 0.02}
    with run(model, enable_prefix_caching=True, turbokv=window) as llm:
        close(e.ask(llm, requests, TOKENS), wanted)
        close(e.ask(llm, requests, TOKENS), wanted)


@pytest.mark.parametrize(
    ("asynchronous", "recompute"), [(True, True), (False, True), (False, False)]
)
def test_hits_leave_no_token_of_the_window_compressed(
    asynchronous: bool, recompute: bool, folder: pathlib.Path
) -> None:
    model = models.make_tiny("dense", folder / "dense")
    length, newest = 150, 32
    requests = e.prompts((length,), models.VOCAB, 1)
    turbokv = {"window": newest, "window_pool_fraction": 0.02, "recompute_window": recompute}
    settings = {"enable_prefix_caching": True, "async_scheduling": asynchronous}
    with run(model, "tq2", turbokv=turbokv, **settings) as llm:
        # enough new tokens for those of the prompt to leave the window, and so their copies
        cold = e.ask(llm, requests, newest + 16)
        window = live_windows()[-1]
        before = window.metrics().compressed
        hit = e.ask(llm, requests, TOKENS)
        compressed = window.metrics().compressed - before
        cached = e.cached_tokens(llm, requests)
        page = llm.llm_engine.vllm_config.cache_config.block_size
    # with vLLM's own scheduler only the last token has to be computed, and the page that it is in
    computed = newest if recompute else 1
    assert cached == [(length - computed) // page * page]
    assert (compressed == 0) == recompute
    if recompute:
        # those before the window are read compressed now, by the tokens that are computed anew
        close(hit, [e.Answer(a.tokens[:TOKENS], a.top[:TOKENS]) for a in cold])


@both_runners
def test_chunked_prefill_with_decodes_in_the_same_step(folder: pathlib.Path) -> None:
    model = models.make_tiny("dense", folder / "dense")
    requests, wanted = reference_of(model, (30, LONG, 17, LONG // 2, 64), 2, 0, TOKENS)
    with run(model) as llm:
        close(e.ask_in_turn(llm, requests, (0, 2, 3, 4, 5), TOKENS), wanted)


def test_context_beyond_the_workspace_is_read_in_pieces(folder: pathlib.Path) -> None:
    model = models.make_tiny("dense", folder / "dense")
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
    with run(model, turbokv={**BARE, "workspace_tokens": BATCH}) as llm:
        close(e.ask(llm, requests, TOKENS), wanted)


@pytest.mark.parametrize("kind", ["dense", "mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {"path": "flash_attn"},
        {"path": "flash_attn", "workspace_tokens": 64 if CPU else 512},
        pytest.param({"path": "flash_attn", "decode": "decompress"}),
    ],
    ids=["flash_attn", "flash_attn in pieces", "decode by decompression"],
)
def test_paths_agree(kind: str, options: dict[str, Any], folder: pathlib.Path) -> None:
    model = models.make_tiny(kind, folder / kind)
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
    with run(model, turbokv={**BARE, **options}) as llm:
        close(e.ask(llm, requests, TOKENS), wanted, 2 * TOLERANCE)  # fresh tokens as codes, too


@gpu_only
@pytest.mark.parametrize("window", [BARE, {"window": 128, "sinks": 4}], ids=["bare", "window"])
@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_the_flashinfer_path_agrees(
    kind: str, window: dict[str, Any], folder: pathlib.Path
) -> None:
    from turbokv.integrations.vllm.prefill.flashinfer import why_unavailable

    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    model = models.make_tiny(kind, folder / kind)
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
    options = {**window, "path": "flashinfer"}
    # widths whose module is likely to be built ahead of time
    with run(model, "tq_k5v3", turbokv=options) as llm:
        close(e.ask(llm, requests, TOKENS), wanted, 2 * TOLERANCE)


@both_runners
def test_preempted_requests_resume(folder: pathlib.Path) -> None:
    model = models.make_tiny("dense", folder / "dense")
    lengths = (LONG // 3,) * 6
    requests, wanted = reference_of(model, lengths, 3, 0, 4 * TOKENS)
    # room for little more than half of the requests once they have grown
    page = e.CPU_BLOCK if CPU else 16
    blocks = 6 * (LONG // 3 + 4 * TOKENS) // page * 6 // 10 + LONG * 2 // page
    with run(model, num_gpu_blocks_override=min(blocks, 2 * LONG // page + 2)) as llm:
        close(e.ask(llm, requests, 4 * TOKENS), wanted)


def test_skipped_layers_stay_in_16_bits(folder: pathlib.Path) -> None:
    if CPU:
        pytest.skip("the CPU platform has one backend for all layers")
    for kind, skip in (("dense", [0, 3]), ("mixed", ["sliding_window"]), ("mixed", [0])):
        model = models.make_tiny(kind, folder / kind)
        requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
        with run(model, turbokv={**BARE, "skip_layers": skip}) as llm:
            close(e.ask(llm, requests, TOKENS), wanted)


def offsets_in(llm: Any) -> dict[str, Any]:
    """Return the offsets of all layers of an engine in this process."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {name: layer.impl.cache.offsets for name, layer in context.items()}


def test_keys_are_centred_without_a_file(folder: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    from turbokv.integrations.transformers.calibration_choice import auto_calibration

    model = models.make_tiny("biased", folder / "biased")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wanted_means = auto_calibration(loaded)
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
    errors = {}
    for word in ("none", "weights", "auto"):
        with run(model, "tq4", turbokv={**BARE, "calibration": word}) as llm:
            errors[word] = e.compare(e.ask(llm, requests, TOKENS), wanted).error
            found = offsets_in(llm)
        print(word, errors[word])
        for index, (name, offsets) in enumerate(found.items()):
            if word == "none":
                assert offsets is None, name
                continue
            means = wanted_means.layers[index].offsets
            assert means is not None
            bias = loaded.model.layers[index].self_attn.k_proj.bias.detach().view(2, -1)
            want = means.mu if word == "auto" else bias
            # biases are the weights'; means are of bf16 activations, and of shorter texts where a
            # step takes fewer tokens (0.022 seen)
            tolerance = 0.06 if word == "auto" else 1e-6
            assert float((offsets.mu - want).norm() / want.norm()) < tolerance, name
            last = 4096.0  # what counts is the angle far out
            turned = (offsets.rotary.inv_freq - means.rotary.inv_freq).abs().max() * last
            assert float(turned) < 0.02, name
    assert errors["weights"] < 0.6 * errors["none"]
    assert errors["auto"] < 0.6 * errors["none"]


def test_a_mean_that_offsets_leave_is_warned_of(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbokv.integrations.vllm.offsets import worker

    model = models.make_tiny("biased_fast", folder / "biased_fast")
    seen: list[str] = []
    monkeypatch.setattr(worker.logger, "warning", lambda text, *args: seen.append(text % args))
    with run(model, "tq4"):
        pass
    (warning,) = seen
    assert "keys' energy in layer" in warning
    assert "(too much in layers 0, 1)" in warning
    assert "tq_k8v4" in warning


@pytest.mark.parametrize("travels", [False, True], ids=["pages stay here", "pages travel"])
def test_offsets_after_weights_came_again(
    travels: bool, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables stay where graphs read them; biases are taken anew only if others read the pages."""
    from turbokv.centring import KeyOffsets
    from turbokv.integrations.vllm.offsets import worker

    monkeypatch.setattr(worker, "_stays_here", lambda _: not travels)
    model = models.make_tiny("biased", folder / "biased")
    with run(model, "tq4") as llm:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        caches = [layer.impl.cache for layer in context.values()]
        biases = [cache.offsets.mu for cache in caches]
        for cache in caches:  # as of weights that were others
            old = KeyOffsets(cache.offsets.mu + 1, cache.offsets.rotary)
            cache.set_offsets(old, 2 * LONG, cache.k_offset.device)
        kept = [
            (c.offsets.mu, c.k_offset, c.k_offset.data_ptr(), c.k_offset.clone()) for c in caches
        ]
        llm.collective_rpc("reload_weights")
        for cache, bias, (mu, table, address, rows) in zip(caches, biases, kept, strict=True):
            assert cache.k_offset is table
            assert table.data_ptr() == address
            assert torch.equal(cache.offsets.mu, bias if travels else mu)
            assert torch.equal(table, rows) != travels


def test_a_calibration_file_of_other_weights_is_refused(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from transformers import AutoModelForCausalLM

    from turbokv.integrations.transformers.calibrate import calibrate

    model = models.make_tiny("biased", folder / "biased")
    other = models.make_tiny("biased", tmp_path / "other", seed=1)
    path = tmp_path / "calibration.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    calibrate(loaded.eval(), tokens=128).save(path)
    with (
        pytest.raises(Exception, match=r"wanted one of this model, but .*weights are not"),
        run(model, "tq4", turbokv={**BARE, "calibration": str(path)}),
    ):
        pass


def test_keys_are_centred_by_a_calibration_file(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from transformers import AutoModelForCausalLM

    from turbokv.integrations.transformers.calibrate import calibrate

    model = models.make_tiny("biased", folder / "biased")
    file = tmp_path / "calibration.safetensors"
    # a random model's keys are as good as its tokens
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    calibrate(loaded.eval(), tokens=2048).save(file)
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
    errors = []
    for word in ("none", str(file)):
        options = {**BARE, "calibration": word}
        with run(model, "tq4", turbokv=options) as llm:
            found = e.compare(e.ask(llm, requests, TOKENS), wanted)
        print(found)
        errors.append(found.error)
    assert errors[1] < 0.6 * errors[0]


@both_runners
@pytest.mark.parametrize("options", [BARE, {"window": 32, "sinks": 4}], ids=["codes", "window"])
def test_keys_are_mapped_by_a_calibration_file(
    options: dict[str, int], folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """In pieces of prefill, after prefix hits, in decode, from codes and from 16-bit copies.

    A query that meets keys of the other space answers at random.
    """
    from transformers import AutoModelForCausalLM

    from turbokv.integrations.transformers.calibrate import calibrate

    model = models.make_tiny("biased", folder / "biased")
    file = tmp_path / "calibration.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = calibrate(loaded.eval(), tokens=2048, parts=("offsets", "k_map"))
    found.save(file)
    lengths = (LONG, LONG - 20, 40, LONG // 2, 130)
    requests, wanted = reference_of(model, lengths, 1, 48, TOKENS)
    settings = {**options, "calibration": str(file)}
    with run(model, turbokv=settings, enable_prefix_caching=True) as llm:
        close(e.ask(llm, requests, TOKENS), wanted)
        close(e.ask(llm, requests, TOKENS), wanted)
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        matrices = [layer.impl.cache.k_matrix for layer in context.values()]
        addresses = [matrix.data_ptr() for matrix in matrices]
        llm.collective_rpc("reload_weights")
        again = [layer.impl.cache.k_matrix for layer in context.values()]
    for index, matrix in enumerate(matrices):
        key_map = found.layers[index].k_map
        assert key_map is not None
        assert torch.equal(matrix.cpu(), key_map.matrix.mT)
    assert [matrix.data_ptr() for matrix in again] == addresses


@pytest.mark.parametrize("count", [1, 3, 5, 16])
def test_batches_of_any_size(count: int, folder: pathlib.Path) -> None:
    if CPU and count == 16:
        pytest.skip("slow without a GPU, and no graphs to pad")
    model = models.make_tiny("dense", folder / "dense")
    lengths = tuple(20 + 13 * i for i in range(count))
    requests, wanted = reference_of(model, lengths, 5, 0, TOKENS)
    with run(model) as llm:
        close(e.ask(llm, requests, TOKENS), wanted)


@gpu_only
def test_batches_that_grow_and_shrink(folder: pathlib.Path) -> None:
    """Whatever a batch leaves in shared workspaces, a larger one after it must not read."""
    model = models.make_tiny("dense", folder / "dense")
    lengths = tuple(LONG // 3 + 9 * i for i in range(48))
    requests, wanted = reference_of(model, lengths, 8, 0, TOKENS)
    settings = {"max_num_seqs": 64, "max_num_batched_tokens": 4096}
    with run(model, **settings) as llm:
        # the reference is not told of turns: each answer must be that of its request alone
        for part in (slice(0, 3), slice(0, 48), slice(5, 12), slice(0, 48)):
            close(e.ask(llm, requests[part], TOKENS), wanted[part])


def test_pages_travel_through_a_connector(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbokv.integrations.vllm import connectors

    model = models.make_tiny("dense", folder / "dense")
    requests, wanted = reference_of(model, (LONG, 40, 130), 6, 0, TOKENS)
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    loaded: list[int] = []
    forget = connectors.forget_copies

    def counting(blocks: Any, block_size: int) -> None:
        blocks = list(blocks)
        loaded.extend(blocks)
        forget(blocks, block_size)

    monkeypatch.setattr(connectors, "forget_copies", counting)
    window = {"window": 128, "sinks": 4}
    # this example stores a prompt's first step only, and looks for whole prompts
    settings = {"kv_transfer_config": connector, "max_num_batched_tokens": 2 * LONG}
    for turn in range(2):
        with run(model, turbokv=window, **settings) as llm:
            close([e.ask(llm, [ids], TOKENS)[0] for ids in requests], wanted)
        assert bool(loaded) == (turn == 1)
    # pages of other widths are not found, rather than read as if they were these
    loaded.clear()
    with run(model, "tq_k5v3", **settings) as llm:
        close([e.ask(llm, [ids], TOKENS)[0] for ids in requests], wanted, 2 * TOLERANCE)
    assert not loaded


@gpu_only
def test_sleep_and_wake(folder: pathlib.Path) -> None:
    model = models.make_tiny("dense", folder / "dense")
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
    window = {"window": 128, "sinks": 4}
    with run(model, enable_sleep_mode=True, enable_prefix_caching=True, turbokv=window) as llm:
        close(e.ask(llm, requests, TOKENS), wanted)
        llm.sleep(level=1)
        llm.wake_up()
        close(e.ask(llm, requests, TOKENS), wanted)


@gpu_only
def test_the_workspace_is_bounded_at_250_000_tokens(folder: pathlib.Path) -> None:
    model = models.make_tiny("dense", folder / "dense")
    length = 250_000
    (long,) = e.prompts((length,), models.VOCAB, 7)
    settings = {
        "max_model_len": length + 16,
        "max_num_batched_tokens": 8192,
        "hf_overrides": {"max_position_embeddings": length + 16},
    }
    with run(model, turbokv={**BARE, "workspace_tokens": 32_768}, **settings) as llm:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        e.ask(llm, [long], 4)
        peak = torch.cuda.max_memory_allocated() - before
    # activations of a chunk, but never keys and values of the whole context in 16 bits
    assert peak < length * 2 * 2 * 128 * 2


def test_heads_beyond_flash_attention_prefill_in_slices(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbokv.integrations.vllm.attention.impl import TurboKVImpl

    make = TurboKVImpl.__init__

    def without_flash_attention(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.prefills_in_slices = True

    monkeypatch.setattr(TurboKVImpl, "__init__", without_flash_attention)
    model = models.make_tiny("mixed", folder / "mixed")
    requests, wanted = reference_of(model, (LONG, 40, 5, LONG // 2, 130), 0, 0, TOKENS)
    with run(model) as llm:
        close(e.ask(llm, requests, TOKENS), wanted, 2 * TOLERANCE)  # fresh tokens as codes, too
