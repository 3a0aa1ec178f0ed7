# SPDX-License-Identifier: Apache-2.0
"""What eval scores, and how it adds passages up."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from turbokv.integrations.transformers import evaluate
from turbokv.integrations.transformers.quality import Divergence, compare, pool, ratio_of_means


class Characters:
    """A tokenizer with one token a character, and no BOS."""

    def __call__(self, text: str, return_tensors: str = "pt", **_: bool) -> Characters:
        self.input_ids = torch.tensor([[ord(c) % 64 for c in text]])
        return self


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("length", [4096, 5000, 113_108])
@pytest.mark.parametrize("passages", [1, 2, 3, 4])
def test_passages_are_evenly_spaced_and_separate(length: int, passages: int) -> None:
    starts = evaluate.passage_starts(length, 1024, passages)
    ends = [start + 1024 for start in starts]
    gaps = [b - a for a, b in zip(ends, starts[1:], strict=False)]
    assert len(starts) == passages and all(gap >= 0 for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    # half a gap on either side
    assert abs(starts[0] - (length - ends[-1])) <= 1
    assert all(abs(2 * starts[0] - gap) <= 2 for gap in gaps)


def test_passages_leave_the_reserve_alone() -> None:
    assert evaluate.passage_starts(1000, 100, 4, reserve=600) == [0, 100, 200, 300]
    assert evaluate.passage_starts(1000, 100, 1, reserve=600) == [150]


def test_too_short_a_text_says_how_many_passages_fit() -> None:
    wanted = (
        r"text: wanted at least 1000 tokens \(4 separate passages of 100 to score, 600 to calibrate"
        r" on\), got 999: enough for 3 passages"
    )
    with pytest.raises(ValueError, match=wanted):
        evaluate.passage_starts(999, 100, 4, reserve=600)
    with pytest.raises(ValueError, match="enough for 0 passages"):
        evaluate.passage_starts(500, 100, 1, reserve=600)
    with pytest.raises(ValueError, match="passages: wanted at least 1 of 1 token, got 0 of 5"):
        evaluate.passage_starts(500, 5, 0)


def test_a_sample_is_what_the_text_holds_at_its_starts() -> None:
    text = "".join(chr(n % 64) for n in range(0, 7000, 7))
    ids = Characters()(text, "pt").input_ids
    sample = evaluate.sample_text(Characters(), text, 50, 3, 200)
    assert sample.ids.shape == (3, 50) and sample.held_out.shape == (1, 200)
    for start, passage in zip(sample.starts, sample.ids, strict=True):
        assert torch.equal(passage, ids[0, start : start + 50])
    assert torch.equal(sample.held_out, ids[:, -200:]) and sample.starts[-1] + 50 <= 800
    assert evaluate.sample_text(Characters(), text, 50, 3).held_out.shape == (1, 0)


def test_pool_is_the_mean_over_tokens() -> None:
    whole = pool([Divergence(0.1, 0.9, 1.0, 1.1, 11), Divergence(0.4, 0.6, 0.5, 0.9, 31)])
    assert whole.tokens == 42
    assert whole.kl == pytest.approx((11 * 0.1 + 31 * 0.4) / 42)
    assert whole.one_minus_tv == pytest.approx((11 * 0.9 + 31 * 0.6) / 42)
    assert whole.top1 == pytest.approx((11 * 1.0 + 31 * 0.5) / 42)
    # the last token of each passage has no label
    lost = 10 * math.log(1.1) + 30 * math.log(0.9)
    assert whole.perplexity_ratio == pytest.approx(math.exp(lost / 40))


def test_standard_error_of_a_mean() -> None:
    mean, error = ratio_of_means([1.0, 2.0, 3.0, 6.0])
    # deviations -2, -1, 0, 3: variance 14 / 3, over 4 passages
    assert mean == 3.0 and error == pytest.approx(math.sqrt(14 / 3 / 4))


def test_standard_error_of_a_ratio_is_paired() -> None:
    # hard passages are hard for both: the ratio does not vary at all
    ratio, error = ratio_of_means([2.0, 20.0, 6.0], [1.0, 10.0, 3.0])
    assert ratio == 2.0 and error == pytest.approx(0, abs=1e-12)
    ratio, error = ratio_of_means([1.0, 3.0], [2.0, 2.0])
    # residuals -1 and 1 over a mean of 2, divided by sqrt(2 (2 - 1))
    assert ratio == 1.0 and error == pytest.approx(math.sqrt(2 / 2) / 2)


def test_one_passage_has_no_spread() -> None:
    assert ratio_of_means([3.0], [2.0]) == (1.5, None)
    for above, below in ([], []), ([1.0], [1.0, 2.0]):
        with pytest.raises(ValueError, match="below: wanted one figure for each of at least one"):
            ratio_of_means(above, below)


def test_standard_error_of_a_ratio_covers_the_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    below = 1 + 0.3 * torch.rand(400, 16, generator=generator, dtype=torch.float64)
    above = 2 * below * (1 + 0.2 * torch.randn(400, 16, generator=generator, dtype=torch.float64))
    results = [ratio_of_means(a, b) for a, b in zip(above.tolist(), below.tolist(), strict=True)]
    within = sum(abs(ratio - 2) < error for ratio, error in results if error) / 400
    # 68% for a normal distribution with a known error; of 400 draws, give or take 3 x 2.3%
    assert 0.58 < within < 0.75


def test_each_passage_starts_with_empty_caches(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 64, (3, 48), generator=torch.Generator().manual_seed(2))
    said: list[str] = []
    names = ["fp8", "int4_per_token_head", "k4v4"]
    rows = evaluate.score_table(model, ids, names, {}, chunk=16, progress=said.append)
    factories = {name: evaluate.factory_for(model, name, {}) for name in names}
    alone = [compare(model, ids[i : i + 1], factories, chunk=16) for i in range(3)]
    for row in rows:
        assert row.passages == tuple(scores[row.name] for scores in alone)
        assert row.kl == pytest.approx(sum(p.kl for p in row.passages) / 3)
        assert row.top1 == pytest.approx(sum(p.top1 for p in row.passages) / 3)
    kl = {row.name: row.kl for row in rows}
    ours = rows[-1]
    assert ours.kl_over_int4 == pytest.approx(kl["k4v4"] / kl["int4_per_token_head"])
    assert ours.kl_over_int4_error is not None and ours.kl_over_int4_error > 0
    assert said[0] == "passage 1 of 3: 16 of 48 tokens"
    assert said[-1] == "passage 3 of 3: 48 of 48 tokens"


def test_one_row_of_ids_is_not_taken_for_a_passage(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"ids: wanted shape \[passages, tokens\], got \[48\]"):
        evaluate.score_table(model, torch.zeros(48, dtype=torch.int64), ["fp8"], {})


def test_the_short_list_is_part_of_the_whole() -> None:
    assert set(evaluate.SHORT_PRESETS) < set(evaluate.PRESETS)
