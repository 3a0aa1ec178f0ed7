# SPDX-License-Identifier: Apache-2.0
"""What eval scores, and how it adds passages up."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from turbokv.integrations.transformers import evaluate, quality, texts
from turbokv.integrations.transformers.baselines import BASELINES
from turbokv.integrations.transformers.quality import (
    Divergence,
    compare,
    pool,
    ratio_of_means,
    simulated_cache,
)
from turbokv.integrations.transformers.side_by_side import side_by_side


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
    starts = texts.passage_starts(length, 1024, passages)
    ends = [start + 1024 for start in starts]
    gaps = [b - a for a, b in zip(ends, starts[1:], strict=False)]
    assert len(starts) == passages and all(gap >= 0 for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    # half a gap on either side
    assert abs(starts[0] - (length - ends[-1])) <= 1
    assert all(abs(2 * starts[0] - gap) <= 2 for gap in gaps)


def test_passages_leave_the_reserve_alone() -> None:
    assert texts.passage_starts(1000, 100, 4, reserve=600) == [0, 100, 200, 300]
    assert texts.passage_starts(1000, 100, 1, reserve=600) == [150]


def test_too_short_a_text_says_how_many_passages_fit() -> None:
    wanted = (
        r"text: wanted at least 1000 tokens \(4 separate passages of 100 to score, 600 to calibrate"
        r" on\), got 999: enough for 3 passages"
    )
    with pytest.raises(ValueError, match=wanted):
        texts.passage_starts(999, 100, 4, reserve=600)
    with pytest.raises(ValueError, match="enough for 0 passages"):
        texts.passage_starts(500, 100, 1, reserve=600)
    with pytest.raises(ValueError, match="passages: wanted at least 1 of 1 token, got 0 of 5"):
        texts.passage_starts(500, 5, 0)


def test_a_sample_is_what_the_text_holds_at_its_starts() -> None:
    text = "".join(chr(n % 64) for n in range(0, 7000, 7))
    ids = Characters()(text, "pt").input_ids
    sample = texts.sample_text(Characters(), text, 50, 3, 200)
    assert sample.ids.shape == (3, 50) and sample.held_out.shape == (1, 200)
    for start, passage in zip(sample.starts, sample.ids, strict=True):
        assert torch.equal(passage, ids[0, start : start + 50])
    assert torch.equal(sample.held_out, ids[:, -200:]) and sample.starts[-1] + 50 <= 800
    assert texts.sample_text(Characters(), text, 50, 3).held_out.shape == (1, 0)


def test_pool_is_the_mean_over_tokens() -> None:
    whole = pool([Divergence(0.1, 0.9, 1.0, 1.1, 11, 10), Divergence(0.4, 0.6, 0.5, 0.9, 31, 30)])
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


# --- kinds of text --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", texts.NAMES)
def test_every_kind_holds_eight_passages(kind: str) -> None:
    text = texts.read_text(kind)
    # tokenizers make 3 to 5 letters of English a token, fewer of code
    assert len(text) > 8 * 1024 * 5 and "\ufffd" not in text


def test_what_is_calibrated_on_is_never_scored() -> None:
    words = "".join(chr(n % 64) for n in range(0, 70_000, 7))
    read = {"prose": words, "topics": words[::-1]}
    samples, held_out, bos = texts.sample_texts(
        Characters(), read, 100, 3, ("topics", read["topics"]), True
    )
    assert held_out.shape == (1, texts.CALIBRATION_TOKENS) and bos is None
    length = len(words)
    assert samples["topics"].starts[-1] + 100 <= length - texts.CALIBRATION_TOKENS
    assert samples["prose"].starts[-1] > length - texts.CALIBRATION_TOKENS  # nothing is kept back
    other = texts.sample_texts(Characters(), {"prose": words}, 100, 3, ("f", "a" * 9000), True)
    assert other[1].shape == (1, texts.CALIBRATION_TOKENS) and len(other[1].unique()) == 1
    assert texts.sample_texts(Characters(), {"prose": words}, 100, 3, ("f", "a"), False)[1].shape


# --- rivals with our window -----------------------------------------------------------------------


def test_a_rival_with_a_window_holds_the_newest_and_first_tokens_in_16_bits() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    baseline = BASELINES["int4_per_token_head"]
    cache = simulated_cache(config, baseline, window=40, sinks=4)
    k, v = torch.randn(1, 1, 150, 64), torch.randn(1, 1, 150, 64)
    for start, end in ((0, 3), (3, 70), (70, 100), (100, 149), (149, 150)):
        keys, values = cache.update(k[:, :, start:end], v[:, :, start:end], 0)
        for read, exact, quantize in (
            (keys, k, baseline.quantize_k),
            (values, v, baseline.quantize_v),
        ):
            half = exact.to(torch.float16).float()
            assert torch.equal(read[:, :, start:end], exact[:, :, start:end])  # this chunk
            newest = max(start - 40, 0)
            assert torch.equal(read[:, :, newest:start], half[:, :, newest:start])
            assert torch.equal(read[:, :, : min(4, start)], half[:, :, : min(4, start)])
            if newest > 4:
                older = quantize(half[:, :, 4:newest])
                whole = quantize(exact[:, :, 4:newest])
                found = read[:, :, 4:newest]
                assert ((found == older) | (found == whole)).all()
                assert not torch.equal(found, half[:, :, 4:newest])


def test_a_window_as_long_as_the_text_leaves_only_rounding(model: LlamaForCausalLM) -> None:
    ids = torch.arange(128, dtype=torch.int64)[None] % 64
    names = ["int4_per_token_head", "int4_per_token_head+w128", "k4v4+w128"]
    rows = {row.name: row for row in evaluate.score_table(model, ids, names, {}, chunk=32)}
    plain, windowed, ours = (rows[name].kl for name in names)
    assert windowed < plain / 50
    assert windowed == pytest.approx(ours, rel=1e-3)  # the same tokens in the same 16 bits


def test_unknown_rivals_are_refused() -> None:
    evaluate.check_rivals(evaluate.RIVALS)
    for name in ("fp7", "fp8+x", "fp8+w8+centred", "k4v4"):
        with pytest.raises(ValueError, match="rivals: wanted some of"):
            evaluate.check_rivals([name])


def test_scoring_fewer_tokens_leaves_out_the_others(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 64, (1, 130), generator=torch.Generator().manual_seed(1))
    caches = {
        "int4": lambda: simulated_cache(model.config, BASELINES["int4_per_token_head"]),
    }
    all_of_them = compare(model, ids, caches, chunk=32)["int4"]
    one = compare(model, ids, caches, chunk=32, score_every=32)["int4"]
    # first tokens of chunks 2, 3, 4 and of the last, of two tokens
    assert (one.tokens, one.labelled) == (4, 4)
    assert (all_of_them.tokens, all_of_them.labelled) == (98, 97)
    every = compare(model, ids, caches, chunk=32, score_every=3)["int4"]
    assert every.tokens == 3 * 11 + 1
    assert every.kl == pytest.approx(all_of_them.kl, rel=0.5) and every.kl != all_of_them.kl


def test_tables_of_several_texts_add_up(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 64, (3, 96), generator=torch.Generator().manual_seed(2))
    kinds = {"prose": ids[:2], "code": ids[2:]}
    tables, rows = evaluate.score_tables(model, kinds, ["fp8", "k4v4"], {}, chunk=32)
    whole = evaluate.score_table(model, ids, ["fp8", "k4v4"], {}, chunk=32)
    assert [row.kl for row in rows] == pytest.approx([row.kl for row in whole])
    assert [row.kl_over_fp8_error for row in rows] == pytest.approx(
        [row.kl_over_fp8_error for row in whole]
    )
    assert {kind: len(of_kind[0].passages) for kind, of_kind in tables.items()} == {
        "prose": 2,
        "code": 1,
    }


def test_caches_side_by_side_score_as_one_after_the_other(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(3))
    names = ["fp8", "int4_per_token_head+w16", "k4v4", "k3v3+w32", "k2v2"]
    together = evaluate.score_table(model, ids, names, {}, chunk=48)
    monkeypatch.setattr(quality, "_TOGETHER", 1)
    for one, row in zip(
        evaluate.score_table(model, ids, names, {}, chunk=48), together, strict=True
    ):
        assert row.kl == pytest.approx(one.kl, rel=1e-3) and row.kl > 0
        assert row.top1 == pytest.approx(one.top1, abs=0.01)


def test_windows_of_a_model_hold_side_by_side() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    gemma = Gemma3ForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        whole = gemma(input_ids=ids).logits
        cache = side_by_side([DynamicCache(config=config) for _ in range(3)])
        pieces = [
            gemma(input_ids=ids[:, i : i + 25].expand(3, -1), past_key_values=cache).logits
            for i in range(0, 200, 25)
        ]
    assert torch.allclose(torch.cat(pieces, 1), whole.expand(3, -1, -1), atol=1e-4)
    with pytest.raises(ValueError, match="caches: wanted one or more of as many layers"):
        side_by_side([])
