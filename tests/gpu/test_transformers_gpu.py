# SPDX-License-Identifier: Apache-2.0
"""TurboKVCache on a GPU, with compiled kernels: the same bytes and tokens as on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from turbokv import TurboKVCodec, kernels
from turbokv.calibration import LayerCalibration
from turbokv.centring import KeyOffsets, Rotary, rotary_frequencies
from turbokv.integrations.transformers import TurboKVCache, TurboKVLayer
from turbokv.integrations.transformers.layers import Options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wanted a CUDA device"),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_layer_holds_the_same_bytes_as_on_the_cpu(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(2, 128, generator=generator)
    calibration = LayerCalibration(offsets=KeyOffsets(mu, Rotary(rotary_frequencies(128))))
    layers = [
        TurboKVLayer(
            Options(bits, bits, 32, 4, {}),
            calibration=calibration,
            left_padding=torch.tensor([0, 9]),
        )
        for _ in range(2)
    ]
    for _ in range(5):
        k = torch.randn(2, 2, 100, 128, generator=generator, dtype=torch.bfloat16)
        v = torch.randn(2, 2, 100, 128, generator=generator, dtype=torch.bfloat16)
        layers[0].update(k, v)
        layers[1].update(k.cuda(), v.cuda())
    for name, want in layers[0]._tensors().items():
        assert torch.equal(layers[1]._tensors()[name].cpu(), want), name


@torch.inference_mode()
def test_logits_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=96,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 96, (2, 300))
    logits = []
    for device in ("cpu", "cuda"):
        model.to(device)
        cache = TurboKVCache(config, 4, window=4, sinks=2)
        model(ids[:, :-1].to(device), past_key_values=cache, use_cache=True)
        out = model(ids[:, -1:].to(device), past_key_values=cache, use_cache=True)
        logits.append(out.logits.cpu())
    # keys that round differently may move single coordinates by a level of four bits
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert float(error) < 0.02


def test_codec_on_cuda_runs_triton_and_refuses_cpu_tensors() -> None:
    codec = TurboKVCodec(128, device="cuda")
    assert kernels.resolve_backend("auto", codec.device) in ("cuda", "triton")
    with pytest.raises(ValueError, match="k: wanted device cuda:0, got cpu"):
        codec.compress_k(torch.zeros(4, 128))
