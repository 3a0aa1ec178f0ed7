// SPDX-License-Identifier: Apache-2.0
// Fused decode attention over compressed pages: rotate and split the query, attend, combine,
// un-rotate; one launch.
//
// The grid is persistent. A step is one to eight tiles (16 tokens each) of one KV head; all steps
// of all requests and heads form one line, and every CTA takes an equal, contiguous part of it
// (stream-K, Osama et al., PPoPP 2023). Within a CTA whole steps go to warps in turn: each warp has
// its own online softmax (Milakov and Gimelshein, arXiv:1805.02867) and its own ring of stages,
// which it refills itself, so that the loop has no CTA barrier. Where an item (request, KV head,
// block of query rows) ends, the CTA merges its warps; an item that spans CTAs is finished by the
// last of them to arrive.
//
// Scores are exact in the codes: the query is rotated, scaled by its largest coordinate to integers
// of 16 bits (14 for most of 2-bit keys, see CodeShift) and split in two int8 terms, so that K's
// levels stay int8. V's levels become fp16 by byte permutes; its scale goes into the probability.
#ifndef TURBOKV_DECODE_KERNEL_CUH_
#define TURBOKV_DECODE_KERNEL_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "turbokv/codebook.cuh"
#include "turbokv/decode_config.cuh"
#include "turbokv/decode_output.cuh"
#include "turbokv/decode_query.cuh"
#include "turbokv/decode_ring.cuh"
#include "turbokv/decode_softmax.cuh"
#include "turbokv/decode_warp.cuh"
#include "turbokv/expand.cuh"
#include "turbokv/paged_kv.cuh"
#include "turbokv/ptx.cuh"
#include "turbokv/types.cuh"

namespace turbokv {
namespace decode_detail {

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    DecodeKernel(const __grid_constant__ decode_params_t p, const int num_stages,
                 const bool cached) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (C::kBulk) return;  // never launched there: leave nothing to compile
#endif
  using K = typename C::k_t;
  using V = typename C::v_t;
  constexpr int kHeadDim = C::kHeadDim, kColumns = C::kColumns, kWarps = C::kWarps;
  constexpr int kNB = C::kBlocks8, kTiles = C::kTiles, kHalves = C::kHalves;
  constexpr int kScales = C::kTile - 64;  // offset of the 16 pairs of scales in a tile
  constexpr int kLane = kHeadDim / 32;    // coordinates a lane holds when a warp holds a vector

  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(8) uint64_t barriers[kWarps * kMaxStages];
  __shared__ int slots[kWarps * kMaxStages * kTiles];
  // of looks to come, see `look`
  __shared__ int pages[kWarps][32], next_pages[kWarps][32], kept_slots[kWarps][32];
  __shared__ columns_t<C> columns;
  __shared__ int2 pending[kWarps][kPending];  // slot, first token
  __shared__ int num_kept[kWarps];
  __shared__ int3 item_limits;  // no row needs masking from .x to .y; no token is there from .z on
  __shared__ int warp_total[kWarps], cta_prefix[C::kMaxAligned + 1];

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  uint8_t* cursor = shared;
  uint8_t* ring_base = cursor;
  cursor += kWarps * num_stages * C::kStepBytes;
  float* merge = reinterpret_cast<float*>(cursor);  // [warps, C::kMergeRegs, 32]
  cursor += kWarps * C::kMergeRegs * 128;
  // The rotated query while the item runs, the merged output when it ends.
  float* rows = reinterpret_cast<float*>(cursor);  // [kColumns, kHeadDim]
  cursor += kColumns * kHeadDim * 4;
  uint8_t* query = cursor;  // [2 terms, kColumns, kHeadDim], in the order of K's fragments
  cursor += kColumns * kHeadDim * 2;
  float* offsets =
      reinterpret_cast<float*>(cursor);  // [segments, kColumns]: score of the shared part
  if (p.k_offset_rotated != nullptr) {
    cursor += min(p.num_segments, kSegmentsPerPass) * kColumns * 4;
  }
  int* prefix = reinterpret_cast<int*>(cursor);  // [batch_size + 1], in steps
  // If cached, so that nobody waits for global memory to know a request:
  int* lengths = prefix + p.batch_size + 1;  // [batch_size + 1], the last unused
  int* starts = lengths + p.batch_size + 1;  // [batch_size + 1] with qo_indptr: query rows

  const int group = p.num_qo_heads / p.num_kv_heads;

  // --- the line of steps
  if constexpr (C::kBulk) {
    if (tid == 0) {
      for (int i = 0; i < kWarps * num_stages; ++i) {
        ptx::BarrierInit(ptx::SharedAddress(barriers + i), 1);
      }
      ptx::BarrierInitFence();
    }
  }
  // All before this may overlap the end of the kernel before; all of its writes are seen from here.
  if constexpr (C::kBulk) ptx::WaitForPrimary(), ptx::LaunchDependents();
  // Sum over the threads up to this one; adds the sum over all to `carry`.
  auto scan = [&](int x, int& carry) {
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int y = __shfl_up_sync(~0u, x, o);
      if (lane >= o) x += y;
    }
    if (lane == 31) warp_total[warp] = x;
    __syncthreads();
    int before = carry;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) before += warp_total[i];
      carry += warp_total[i];
    }
    __syncthreads();
    return before + x;
  };
  auto request = [&](int b) {
    int length, first_row = b * p.max_q_len, q_len = p.max_q_len;
    if (cached) {
      length = lengths[b];
      if (p.qo_indptr != nullptr) first_row = starts[b], q_len = starts[b + 1] - first_row;
    } else {
      ReadRequest(p, b, length, first_row, q_len);
    }
    return Request<C>(p, group, length, first_row, q_len);
  };
  int total = 0;
  for (int base = 0; base < p.batch_size; base += C::kThreads) {
    const int b = base + tid;
    int steps = 0;
    if (b < p.batch_size) {
      int length, first_row = b * p.max_q_len, q_len = p.max_q_len;
      ReadRequest(p, b, length, first_row, q_len);
      const request_t r = Request<C>(p, group, length, first_row, q_len);
      if (cached) {
        lengths[b] = r.length;
        if (p.qo_indptr != nullptr) {
          starts[b] = r.first_row;
          if (b + 1 == p.batch_size) starts[b + 1] = r.first_row + r.q_len;
        }
      }
      steps = r.steps * r.blocks * p.num_kv_heads;
    }
    steps = scan(steps, total);
    if (b < p.batch_size) prefix[b + 1] = steps;
  }
  if (tid == 0) prefix[0] = 0;

  // --- this CTA's part of the line
  const int cta = blockIdx.x, ctas = min(static_cast<int>(gridDim.x), total);
  auto share = [&](int i) { return Share(total, i, ctas); };
  auto owner = [&](int step) {
    return static_cast<int>((static_cast<int64_t>(step + 1) * ctas - 1) / total);
  };
  // If there are fewer items than CTAs, whole CTAs an item may do: then no CTA has to merge twice,
  // and few have to wait for others. Requests get CTAs by their length, rounded down, unless the
  // rounding would cost more than a tenth.
  int item_ctas = 0, first_cta_of_item = 0, begin = 0, end = 0;
  if (p.batch_size <= C::kMaxAligned) {
    const int most = total / max(ctas, 1) * 11 / 10 + 1;
    int given = 0;
    bool uneven = false;
    for (int base = 0; base < p.batch_size; base += C::kThreads) {
      const int b = base + tid;
      int want = 0;
      if (b < p.batch_size) {
        const request_t r = request(b);
        const int items = r.blocks * p.num_kv_heads;
        const int each = max(1, ProductQuotient(ctas, r.steps, max(total, 1)));
        want = items * each;
        uneven |= items > 0 && r.steps > most * each;
      }
      want = scan(want, given);
      if (b < p.batch_size) cta_prefix[b + 1] = want;
    }
    if (tid == 0) cta_prefix[0] = 0;
    uneven = __syncthreads_or(uneven || given > ctas);
    if (!uneven) {
      if (cta >= given) return;
      const int b = LastAtMost(cta_prefix, p.batch_size, cta);
      const request_t r = request(b);
      item_ctas = Quotient(cta_prefix[b + 1] - cta_prefix[b], r.blocks * p.num_kv_heads);
      const int item = Quotient(cta - cta_prefix[b], item_ctas);
      first_cta_of_item = cta_prefix[b] + item * item_ctas;
      const int part = cta - first_cta_of_item, first = prefix[b] + item * r.steps;
      const int whole = Quotient(r.steps, item_ctas), rest = r.steps - whole * item_ctas;
      begin = first + whole * part + Quotient(rest * part, item_ctas);
      end = first + whole * (part + 1) + Quotient(rest * (part + 1), item_ctas);
    }
  }
  if (item_ctas == 0) {
    if (cta >= ctas) return;
    begin = share(cta), end = share(cta + 1);
  }
  __syncthreads();
  auto find = [&](int step) { return LastAtMost(prefix, p.batch_size, step); };
  const int own = end - begin > warp ? (end - begin - warp + kWarps - 1) / kWarps : 0;

  // --- the ring; sources of the next steps are looked up by all lanes at once
  constexpr int kPerLook = 32 / kTiles;
  const int tiles_per_page = p.kv.page_size / kTokensPerTile;
  // Tiles of a page lie together: one copy brings what a step has of them, if pages are so large.
  const int run = tiles_per_page % kTiles == 0   ? kTiles
                  : tiles_per_page == kTiles / 2 ? kTiles / 2
                                                 : 1;
  // The page of a step comes from the page table and its slot from another table, by its page:
  // loads whose latencies would add up. So pages are read two looks ahead and slots one, to shared
  // memory: registers that a load will fill would be copied, and so waited for, in every step.
  int looked_up = 0, request_begin = 0, request_end = 0;
  // Where the page of this lane's tile is written, null if there is nothing to read, and
  // head << 20 | tile of the page.
  auto look = [&](int chunk, const int32_t*& entry) {
    entry = nullptr;
    if (chunk * kPerLook >= own) return 0;
    const int i = chunk * kPerLook + lane / kTiles;  // of this warp's steps
    const int step = begin + warp + kWarps * i;
    // mostly the request of the last look
    if (__any_sync(~0u, step < request_begin || step >= request_end)) {
      looked_up = find(step);
      request_begin = prefix[looked_up], request_end = prefix[looked_up + 1];
    }
    const request_t r = request(looked_up);
    const int x = step - request_begin, item = Quotient(x, r.steps);
    const int tile = (r.first_step + r.steps - 1 - (x - item * r.steps)) * kTiles + lane % kTiles;
    const int page_of_request = Quotient(tile, tiles_per_page);
    if (i < own && tile * kTokensPerTile < r.length) {
      entry = p.kv.page_table + TableEntry(p.kv, looked_up, page_of_request);
    }
    return Quotient(item, r.blocks) << 20 | (tile - page_of_request * tiles_per_page);
  };
  auto slot_entry = [&](int page, int head_tile) -> const int32_t* {
    if (p.kv.tile_slots == nullptr || page < 0) return nullptr;
    return p.kv.tile_slots + static_cast<int64_t>(page) * tiles_per_page + (head_tile & 0xFFFFF);
  };
  auto source_of = [&](int page, int head_tile, int slot) -> const uint8_t* {
    if (page < 0 || slot >= 0) return nullptr;  // what is kept in 16 bits is not brought
    return TileAddress(p.kv, page, head_tile >> 20, head_tile & 0xFFFFF, C::kTile);
  };
  // Bring an integer a lane; -1 without a source.
  auto bring = [&](int* to, const int32_t* from) {
    if (from == nullptr) {
      to[lane] = -1;
    } else {
      ptx::AsyncCopy4(ptx::SharedAddress(to + lane), from);
    }
  };
  ring_t<C> ring;
  ring.stages = ring_base + warp * num_stages * C::kStepBytes;
  ring.stages_address = ptx::SharedAddress(ring.stages);
  ring.barriers = ptx::SharedAddress(barriers + warp * num_stages);
  ring.slots = slots + warp * kMaxStages * kTiles;
  ring.num_stages = num_stages;
  int page = -1, slot = -1, head_tile = 0, after_head_tile = 0, source_head = 0;
  const uint8_t* source = nullptr;
  // A bit a lane, for the steps of a look: what is brought, and what is kept in 16 bits.
  uint32_t present = 0, kept_of_look = 0;
  int issued = 0, attended = 0, write_stage = 0;  // steps: to stages, and read from them
  int depth = 2;                                  // how many may be issued and not read
  constexpr uint32_t kAllTiles = (1u << kTiles) - 1;
  // Which tiles of the steps in flight are kept in 16 bits, the oldest step in the lowest bits.
  uint64_t kept_tiles = 0;
  static_assert(kMaxStages * kTiles <= 64, "a bit a tile");
  // The step about to be issued to a stage: which of its tiles are kept in 16 bits.
  auto note_kept = [&](int stage) {
    const int at = issued % kPerLook * kTiles;
    const uint32_t kept = kept_of_look >> at & kAllTiles;
    if (kept == 0) return;
    kept_tiles |= static_cast<uint64_t>(kept) << (issued - attended) * kTiles;
    const int tile = lane - at;
    if (tile >= 0 && tile < kTiles) {
      ring.slots[stage * kTiles + tile] = slot;
      if (C::kBulk && slot >= 0) {
        ptx::BulkPrefetch(
            p.kv.window + (static_cast<int64_t>(slot) * p.num_kv_heads + source_head) *
                              (2 * kTokensPerTile * kHeadDim),
            4 * kTokensPerTile * kHeadDim);
      }
    }
  };
  // The same, and the next look if it was the last step of this one.
  auto note = [&](int stage) {
    note_kept(stage);
    if ((issued + 1) % kPerLook == 0) {
      // All but the newest group of the other body are there, once steps are waited for.
      if (C::kBulk || attended == 0) ptx::AsyncWait<0>();
      slot = kept_slots[warp][lane];
      source = source_of(page, head_tile, slot), source_head = head_tile >> 20;
      present = __ballot_sync(~0u, source != nullptr);
      kept_of_look = __ballot_sync(~0u, slot >= 0);
      // A lane reads its own integers, and needs them before it sends for the next.
      page = pages[warp][lane], head_tile = after_head_tile;
      bring(kept_slots[warp], slot_entry(page, head_tile));
      const int32_t* entry;
      after_head_tile = look((issued + 1) / kPerLook + 2, entry);
      bring(pages[warp], entry);
      if constexpr (C::kBulk) ptx::AsyncCommit();
    }
  };
  // Whatever a multiprocessor asks for, instructions as well, comes after all that it has asked for
  // before: asking for all stages at once kept the first step from beginning for 8 us. So one step
  // is asked for at first, one more by the loop, and two for each one read until the ring is full.
  auto start = [&]() {
    const int32_t* entry;
    int first_head_tile = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < 3; ++chunk) {  // a loop: less to fetch
      first_head_tile = head_tile, head_tile = after_head_tile;
      after_head_tile = look(chunk, entry);
      bring(chunk == 0 ? kept_slots[warp] : chunk == 1 ? next_pages[warp] : pages[warp], entry);
      ptx::AsyncCommit();
    }
    ptx::AsyncWait<2>();
    const int first_page = kept_slots[warp][lane];
    entry = slot_entry(first_page, first_head_tile);
    slot = ptx::LoadIf(entry != nullptr, entry, -1), source_head = first_head_tile >> 20;
    // The first step is brought before it is known whether it is kept in 16 bits.
    source = source_of(first_page, first_head_tile, -1);
    present = __ballot_sync(~0u, source != nullptr);
    if (own > 0) ring.Issue(0, source, present, 0, lane, run);
    ptx::AsyncWait<1>();
    page = next_pages[warp][lane];
    bring(kept_slots[warp], slot_entry(page, head_tile));
    ptx::AsyncCommit();
  };
  auto refill = [&]() {
#pragma unroll 1
    for (; issued - attended < depth; ++issued) {
      if (issued < own) {
        ring.Issue(write_stage, source, present, issued % kPerLook * kTiles, lane, run);
        note(write_stage);
      }
      // A group even when nothing is left, so that waiting for all but one means the oldest.
      if constexpr (!C::kBulk) ptx::AsyncCommit();
      if (++write_stage == num_stages) write_stage = 0;
    }
    depth = min(depth + 1, num_stages);
  };

  const int zero = min(num_stages, 0);  // to the compiler any number
  const table_t k_table =
      MakeTable<C::kKBits, C::kSumTables ? bytes_t::kSignedSum : bytes_t::kSigned>(p.k_codebook);
  const table_t v_table = MakeTable<C::kVBits, bytes_t::kOffset128>(p.v_codebook);
  const table_t v_negative = C::kVBits == 5 ? MakeNegativeTable5(p.v_codebook) : table_t{};
  const uint32_t k_signs = LaneSigns<kLane>(p.k_signs, lane);
  const uint32_t v_signs = LaneSigns<kLane>(p.v_signs, lane);
  const float k_unit = exp2f(-p.k_codebook.frac_bits) *
                       (K::kKind == expand_t::kUniform2 ? 2 * p.k_codebook.magnitudes[0] : 1);
  const float v_unit = exp2f(-p.v_codebook.frac_bits) *
                       (V::kKind == expand_t::kUniform2 ? 2 * p.v_codebook.magnitudes[0] : 1);
  const bool capped = p.logits_soft_cap > 0, centred = p.k_offset_rotated != nullptr;
  // Which token of a tile a lane's scores belong to: row(half), see state_t.
  const int row0 = kHalves == 1 ? g + (t >> 1) * 8 : g;
  const int term_weight = t < 2 ? 256 : 1;

  int own_step = begin + warp, unflushed = 0;
#pragma unroll 1
  for (int item_begin = begin; item_begin < end;) {
    const int b = find(item_begin);
    const request_t r = request(b);
    const int x0 = item_begin - prefix[b], item = x0 / r.steps, step0 = x0 - item * r.steps;
    const int head = item / r.blocks, block = item - head * r.blocks;
    const int item_end = min(end, item_begin + r.steps - step0);

    const int own_position = r.length - r.q_len;

    uint32_t query_bits[kLane];  // of the row that this warp rotates first
    LoadQuery<C>(p, r, group, head, block, warp, query_bits);
    if (item_begin == begin) {
      if (centred) {
        // The offsets' scores would have to wait for them.
        constexpr int kLines = kHeadDim * 4 / 128;
        const int last = min(r.length / kTokensPerSegment, p.num_segments - 1);
        for (int i = tid; i < (last + 1) * kLines && i < kSegmentsPerPass * kLines;
             i += C::kThreads) {
          const int64_t segment = last - i / kLines;
          ptx::Prefetch(p.k_offset_rotated + (segment * p.num_kv_heads + head) * kHeadDim +
                        i % kLines * 32);
        }
      }
      start();
    }
    if (tid == 0) {
      const int first_position = own_position + block * kColumns / group;
      const int last_position = own_position + (min((block + 1) * kColumns, r.rows) - 1) / group;
      item_limits.x = p.window_left >= 0 ? last_position - p.window_left : 0;
      item_limits.y = p.causal ? min(first_position + 1, r.length) : r.length;
      item_limits.z = r.length;
    }

    RotateQuery<C>(p, r, group, head, block, k_signs, k_unit, query_bits, rows, query, columns);
    if (item_begin == begin) {
      kept_of_look = __ballot_sync(~0u, slot >= 0);
      if (own > 0) note_kept(0);
      issued = write_stage = 1;
    }
    __syncthreads();

    // --- the query in fragments: column g of a block, bytes of k in order
    uint32_t qb[kNB][C::kTerms][C::kQueryRegs];
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
#pragma unroll
      for (int term = 0; term < C::kTerms; ++term) {
        const int row = kColumns == 4 ? g : term * kColumns + n * 8 + g;
        const uint4* from =
            reinterpret_cast<const uint4*>(query + row * kHeadDim + t * (kHeadDim / 4));
#pragma unroll
        for (int i = 0; i < C::kQueryRegs / 4; ++i) {
          const uint4 x = from[i];
          qb[n][term][4 * i] = x.x, qb[n][term][4 * i + 1] = x.y;
          qb[n][term][4 * i + 2] = x.z, qb[n][term][4 * i + 3] = x.w;
        }
      }
    }
    float unit[kNB][2];
    int first[kNB][C::kTerms][4];  // what sums of products start from
    auto column = [&](int n, int x) { return (n * 8 + 2 * t + x) & (kColumns - 1); };
#pragma unroll
    for (int n = 0; n < kNB; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        unit[n][x] = capped ? 1.f : columns.query_scale[column(n, x)];
        const int sum = columns.query_sum[column(n, x)];
        const int lacking = K::kKind == expand_t::kUniform2         ? -(sum / 2 * 3)
                            : K::kKind == expand_t::kSignMagnitude5 ? sum
                                                                    : 0;
#pragma unroll
        for (int term = 0; term < C::kTerms; ++term) {
          const bool is_low = C::kTerms == 1 ? t >= 2 : term == 1;
          first[n][term][x] = is_low ? lacking : 0;
          // equal, but if the compiler knew it would copy registers for every product
          first[n][term][2 + x] = is_low && lacking != 0 ? lacking + zero : 0;
        }
      }
    }
    // Steps of an item go from the newest to the oldest: what is kept in 16 bits, mostly among the
    // newest, is in L2 when the warps come to it in the end.
    const int newest_step = r.first_step + r.steps - 1 - step0 + item_begin;
    state_t<C> state;
    state.Reset();
    const float cap = p.logits_soft_cap * kLog2E,
                inverse_cap = capped ? __fdividef(2, p.logits_soft_cap) : 0;
    // Scores in powers of two; tanh(y) = 1 - 2 / (exp(2 y) + 1)
    auto soft_cap = [&](float x) {
      return cap * (1 - __fdividef(2, ptx::Exp2(x * inverse_cap) + 1));
    };
    auto mask = [&](float(&s)[kNB][2 * kHalves], int token, int half) {
#pragma unroll
      for (int n = 0; n < kNB; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int c = column(n, x);
          const bool hidden =
              (token < columns.see_begin[c]) | (token >= columns.see_end[c]);  // no branches
          s[n][2 * half + x] = hidden ? -INFINITY : s[n][2 * half + x];
        }
      }
    };

    // --- a tile kept in 16 bits: the same with fp16 operands from global memory
    auto attend_kept = [&](const int2 kept) {
      const int slot = kept.x, token0 = kept.y;
      const __half* window = p.kv.window + (static_cast<int64_t>(slot) * p.num_kv_heads + head) *
                                               (2 * kTokensPerTile * kHeadDim);
      // K: lane (g, t) reads coordinates 32 k + 8 t + 0..7 of tokens g and g + 8
      constexpr int kLoads = kHeadDim / 32;
      constexpr bool kEarly = kHeadDim <= 128;  // V's loads fit the registers as well
      uint4 keys[kLoads][2], values[kEarly ? V::kSections : 1][2][V::kCodes / 4];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          keys[k][half] = __ldg(
              reinterpret_cast<const uint4*>(window + (g + half * 8) * kHeadDim + 32 * k + 8 * t));
        }
      }
      // V: lane (g, t) reads, of tokens g and g + 8, the coordinates that rows 2t and 2t + 1 of
      // the operands have, which are neighbours; transposing 8x8 blocks makes tokens run along k.
      auto load_values = [&](uint4(&to)[2][V::kCodes / 4], int section) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4* from =
              reinterpret_cast<const uint4*>(window + (kTokensPerTile + half * 8 + g) * kHeadDim +
                                             V::Coordinate(section, 0, 0, 2 * t));
          // what was never written may be NaN, which a probability of zero would not stop
          const bool written = token0 + half * 8 + g < item_limits.z;
#pragma unroll
          for (int k = 0; k < V::kCodes / 4; ++k) {
            to[half][k] = written ? __ldg(from + k) : make_uint4(0, 0, 0, 0);
          }
        }
      };
      if constexpr (kEarly) {
#pragma unroll
        for (int section = 0; section < V::kSections; ++section)
          load_values(values[section], section);
      }
      float s[1][kNB][2 * kHalves], none[1][kHalves] = {};
#pragma unroll
      for (int n = 0; n < kNB; ++n) {
        float dots[4] = {0, 0, 0, 0}, more[4] = {0, 0, 0, 0};  // two chains
        const float* q = rows + ((n * 8 + g) & (kColumns - 1)) * kHeadDim;
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          const int j = 32 * k + 8 * t;
          const uint4 x = keys[k][0], y = keys[k][1];
          // the query in two fp16 terms, or its rounding would be the largest error of all
          uint32_t high[4], low[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const __half2 h = __floats2half2_rn(q[j + 2 * i], q[j + 2 * i + 1]);
            high[i] = *reinterpret_cast<const uint32_t*>(&h);
            low[i] = PackHalf2(q[j + 2 * i] - __low2float(h), q[j + 2 * i + 1] - __high2float(h));
          }
          if constexpr (kColumns == 4) {  // low terms have columns 4 to 7
#pragma unroll
            for (int i = 0; i < 4; ++i) high[i] = g < 4 ? high[i] : low[i];
            ptx::MmaF16(dots, x.x, y.x, x.y, y.y, high[0], high[1]);
            ptx::MmaF16(more, x.z, y.z, x.w, y.w, high[2], high[3]);
          } else {
            ptx::MmaF16(dots, x.x, y.x, x.y, y.y, high[0], high[1]);
            ptx::MmaF16(more, x.x, y.x, x.y, y.y, low[0], low[1]);
            ptx::MmaF16(dots, x.z, y.z, x.w, y.w, high[2], high[3]);
            ptx::MmaF16(more, x.z, y.z, x.w, y.w, low[2], low[3]);
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) dots[e] += more[e];
#pragma unroll
        for (int e = 0; e < 2 * kHalves; ++e) {
          float x = dots[e];
          if constexpr (kHalves == 1) {
            const float give = t < 2 ? dots[2 + e] : dots[e];
            x = (t < 2 ? dots[e] : dots[2 + e]) + __shfl_xor_sync(~0u, give, 2);
          }
          x *= p.sm_scale * kLog2E;
          s[0][n][e] = capped ? soft_cap(x) : __fdividef(x, unit[n][e & 1]);
        }
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) mask(s[0], token0 + half * 8 + row0, half);
      uint32_t pb[1][kNB][2];
      state.template Softmax<1, true>(s, none, unit, zero, pb);
      const float gain = __fdividef(state.v_gain, v_unit * kWindowGain);
#pragma unroll
      for (int section = 0; section < V::kSections; ++section) {
        if constexpr (!kEarly) load_values(values[0], section);
        uint32_t words[2][V::kCodes];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int k = 0; k < V::kCodes / 4; ++k) {
            const uint4 x = values[kEarly ? section : 0][half][k];
            words[half][4 * k] = x.x, words[half][4 * k + 1] = x.y;
            words[half][4 * k + 2] = x.z, words[half][4 * k + 3] = x.w;
          }
        }
#pragma unroll
        for (int k = 0; k < V::kBlocks; ++k) {
          uint32_t a[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = V::Offset(k, e & 1);
            a[e] = ptx::Transpose8x8(ptx::Permute(words[e / 2][at / 2],
                                                  words[e / 2][(V::kCodes + at) / 2],
                                                  at % 2 == 0 ? 0x5410 : 0x7632));
          }
#pragma unroll
          for (int n = 0; n < kNB; ++n) {
            float sum[4] = {0, 0, 0, 0};
            ptx::MmaF16(sum, a[0], a[1], a[2], a[3], pb[0][n][0], pb[0][n][1]);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              // uniform 2-bit outputs count in field units, see V::Expand
              const float field = V::kKind == expand_t::kUniform2
                                      ? 1.f / (1 << (24 - 2 * (2 * (k % 2) + e / 2)))
                                      : 1.f;
              state.o[n][section * V::kBlocks + k][e] += sum[e] * (gain * field);
            }
          }
        }
      }
    };

    int num_pending = 0;
#pragma unroll 1
    for (int pass_begin = item_begin; pass_begin < item_end;) {
      int pass_end = item_end, first_segment = 0;
      if (p.k_offset_rotated != nullptr) {
        // --- scores of the offsets of K in this stretch
        const int newest = newest_step - pass_begin;  // step of the request
        const int last_segment = (newest * C::kStepTokens + C::kStepTokens - 1) / kTokensPerSegment;
        first_segment = max(0, last_segment - kSegmentsPerPass + 1);
        pass_end = min(item_end, pass_begin + newest + 1 -
                                     first_segment * (kTokensPerSegment / C::kStepTokens));
        const int oldest = newest_step - (pass_end - 1);
        first_segment = max(first_segment, oldest * C::kStepTokens / kTokensPerSegment);
        const int segments = min(last_segment, p.num_segments - 1) - first_segment + 1;
        __syncthreads();
        ScoreOffsets<C>(p, head, first_segment, segments, rows, columns, offsets);
        __syncthreads();
      }

      for (;;) {
#pragma unroll 1
        for (; own_step < pass_end && num_pending <= kPending - kTiles; own_step += kWarps) {
          refill();
          const uint8_t* stage = ring.Wait();
          const int token0 = (newest_step - own_step) * C::kStepTokens;
          // Tiles kept in 16 bits have not been read: skip them here, attend to them below.
          const uint32_t kept = static_cast<uint32_t>(kept_tiles) & kAllTiles;
          kept_tiles >>= kTiles, ++attended;
          if (kept != 0) {
            if (lane < kTiles && (kept >> lane & 1)) {
              pending[warp][num_pending + __popc(kept & ((1u << lane) - 1))] =
                  make_int2(ring.slots[ring.read * kTiles + lane], token0 + lane * kTokensPerTile);
            }
            num_pending += __popc(kept);
          }
          if (kept != kAllTiles) {
            float s[kTiles][kNB][2 * kHalves], v_scale[kTiles][kHalves];
            float offset[kNB][2];  // score of the part of K that its segment shares
            uint32_t marks = 0;    // in bit 15: whether a key was stored uncentred
            const int segment = token0 / kTokensPerSegment;
            const bool has_offset = centred && segment < p.num_segments;
#pragma unroll
            for (int n = 0; n < kNB; ++n) {
#pragma unroll
              for (int x = 0; x < 2; ++x) {
                offset[n][x] =
                    has_offset ? offsets[(segment - first_segment) * kColumns + column(n, x)] : 0.f;
              }
            }

            // --- scores: S[token, column]; rows g and g + 8, columns 2t and 2t + 1
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              const uint8_t* tile = stage + i * C::kTile;
              int acc[kNB][C::kTerms][4];
#pragma unroll
              for (int k = 0; k < K::kSteps; ++k) {
                uint32_t w[2][K::kWords], h[2][2], a[2][K::kRegs], extra[2][K::kRegs];
                K::Load(tile, k, g, t, w, h);
                K::template Expand<C::kSumTables>(w, h, k_table, a, extra);
#pragma unroll
                for (int q = 0; q < K::kRegs / 2; ++q) {
                  const int at = k * K::kRegs + 2 * q;
#pragma unroll
                  for (int n = 0; n < kNB; ++n) {
#pragma unroll
                    for (int term = 0; term < C::kTerms; ++term) {
                      const uint32_t b0 = qb[n][term][at], b1 = qb[n][term][at + 1];
                      if (at == 0) {
                        ptx::MmaS8From(acc[n][term], first[n][term], a[0][2 * q], a[1][2 * q],
                                       a[0][2 * q + 1], a[1][2 * q + 1], b0, b1);
                      } else {
                        ptx::MmaS8(acc[n][term], a[0][2 * q], a[1][2 * q], a[0][2 * q + 1],
                                   a[1][2 * q + 1], b0, b1);
                      }
                      if constexpr (K::TwoTerms(C::kSumTables)) {
                        ptx::MmaS8(acc[n][term], extra[0][2 * q], extra[1][2 * q],
                                   extra[0][2 * q + 1], extra[1][2 * q + 1], b0, b1);
                      }
                    }
                  }
                }
              }
#pragma unroll
              for (int half = 0; half < kHalves; ++half) {
                const __half2 scales =
                    *reinterpret_cast<const __half2*>(tile + kScales + (row0 + half * 8) * 4);
                marks |= *reinterpret_cast<const uint32_t*>(&scales);
                v_scale[i][half] = __high2float(scales);
                const float k_scale = fabsf(__low2float(scales));
#pragma unroll
                for (int n = 0; n < kNB; ++n) {
#pragma unroll
                  for (int x = 0; x < 2; ++x) {
                    int dot;
                    if constexpr (kHalves == 1) {
                      // High terms are in columns 0..3 and low terms in 4..7. Lanes t and t ^ 2
                      // give each other what the other's token lacks.
                      const int low_row = acc[n][0][x], high_row = acc[n][0][2 + x];
                      const int keep = t < 2 ? low_row : high_row;
                      const int give = (t < 2 ? high_row : low_row) * term_weight;
                      dot = keep * term_weight + __shfl_xor_sync(~0u, give, 2);
                    } else {
                      dot = acc[n][0][2 * half + x] * 256 + acc[n][C::kTerms - 1][2 * half + x];
                    }
                    s[i][n][2 * half + x] = fmaf(static_cast<float>(dot), k_scale, offset[n][x]);
                  }
                }
              }
            }
            // What few steps need is behind one branch.
            const bool uncentred = has_offset && __any_sync(~0u, marks & 0x8000u);
            const bool masked = token0 + C::kStepTokens > item_limits.y || token0 < item_limits.x;
            if (uncentred || masked || capped || kept != 0) {
              if (uncentred) {
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                  for (int half = 0; half < kHalves; ++half) {
                    const uint8_t* at = stage + i * C::kTile + kScales + (row0 + half * 8) * 4;
                    if (*reinterpret_cast<const uint32_t*>(at) & 0x8000u) {
#pragma unroll
                      for (int n = 0; n < kNB; ++n) {
                        s[i][n][2 * half] -= offset[n][0], s[i][n][2 * half + 1] -= offset[n][1];
                      }
                    }
                  }
                }
              }
              if (capped) {
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                  for (int n = 0; n < kNB; ++n) {
#pragma unroll
                    for (int e = 0; e < 2 * kHalves; ++e) {
                      s[i][n][e] = soft_cap(s[i][n][e] * columns.query_scale[column(n, e & 1)]);
                    }
                  }
                }
              }
              if (masked) {
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                  for (int half = 0; half < kHalves; ++half) {
                    const int token = token0 + i * kTokensPerTile + half * 8 + row0;
                    mask(s[i], token, half);
                    // what was never written may be anything
                    if (token >= item_limits.z) v_scale[i][half] = 0;
                  }
                }
              }
              if (kept != 0) {
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
                  if (!(kept >> i & 1)) continue;
#pragma unroll
                  for (int half = 0; half < kHalves; ++half) {
                    v_scale[i][half] = 0;
#pragma unroll
                    for (int n = 0; n < kNB; ++n)
                      s[i][n][2 * half] = s[i][n][2 * half + 1] = -INFINITY;
                  }
                }
              }
            }

            uint32_t pb[kTiles][kNB][2];
            state.template Softmax<kTiles, false>(s, v_scale, unit, zero, pb);

            // --- O[coordinate, column] += V[coordinate, token] P[token, column]
            float odd[kNB][4] = {};  // half of the corrections: half the chain of products
            // Of uniform levels the correction is of their size: two tiles' probabilities may be
            // added in fp16 before. There is room, see kMostProduct.
            constexpr bool kPairs = kTiles == 8 && V::kKind == expand_t::kUniform2;
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              const uint8_t* v = stage + i * C::kTile + K::kBytes;
              constexpr uint32_t kConstant =
                  V::kKind == expand_t::kUniform2 ? 0xBE00BE00u : 0xE480E480u;
              // Levels come with a constant added (1.5 codes, or 1152): the product of its negative
              // with the same rounded probabilities takes it away again, before it can swamp the
              // sum.
#pragma unroll
              for (int n = 0; n < kNB; ++n) {
                if constexpr (kPairs) {
                  if (i % 2 == 1) continue;
                  ptx::MmaF16(i % 4 == 2 ? odd[n] : state.correction[n], kConstant, kConstant,
                              kConstant, kConstant, AddHalf2(pb[i][n][0], pb[i + 1][n][0]),
                              AddHalf2(pb[i][n][1], pb[i + 1][n][1]));
                } else {
                  ptx::MmaF16(kTiles == 8 && i % 2 == 1 ? odd[n] : state.correction[n], kConstant,
                              kConstant, kConstant, kConstant, pb[i][n][0], pb[i][n][1]);
                }
              }
#pragma unroll
              for (int section = 0; section < V::kSections; ++section) {
                uint32_t w[V::kWords], h[2];
                V::Load(v, section, lane, w, h);
#pragma unroll
                for (int k = 0; k < V::kBlocks; ++k) {
                  uint32_t a[4];
                  V::Expand(w, h, k, v_table, v_negative, a);
#pragma unroll
                  for (int n = 0; n < kNB; ++n) {
                    ptx::MmaF16(state.o[n][section * V::kBlocks + k], a[0], a[1], a[2], a[3],
                                pb[i][n][0], pb[i][n][1]);
                  }
                }
              }
            }
            if constexpr (kTiles == 8) {
#pragma unroll
              for (int n = 0; n < kNB; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) state.correction[n][e] += odd[n][e];
              }
            }
          }
          __syncwarp();  // the stage may be filled again
          ring.Advance();
          if constexpr (V::kKind != expand_t::kUniform2) {
            if (++unflushed == kFlushSteps) state.Flush(), unflushed = 0;
          }
        }
        if (own_step >= pass_end) break;
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < num_pending; ++i) attend_kept(pending[warp][i]);
        num_pending = 0;
        __syncwarp();
      }
      pass_begin = pass_end;
    }
    if (p.kv.tile_slots != nullptr) {
      // The newest tokens are a few neighbouring tiles: the warps share what is left.
      if (lane == 0) num_kept[warp] = num_pending;
      __syncthreads();
      int before = 0;
#pragma unroll 1
      for (int w = 0; w < kWarps; ++w) {
        for (int i = (warp - before % kWarps + kWarps) % kWarps; i < num_kept[w]; i += kWarps) {
          attend_kept(pending[w][i]);
        }
        before += num_kept[w];
      }
    }

    MergeWarps<C>(state, unit, v_unit, merge, rows, columns);
    bool write = true;
    if (step0 != 0 || item_end - item_begin != r.steps) {  // the item spans CTAs
      // Items of all requests, at most max_q_len rows each.
      const int max_blocks = (p.max_q_len * group + kColumns - 1) / kColumns;
      const int counter = (b * p.num_kv_heads + head) * max_blocks + block;
      const int line_begin = item_begin - step0;
      parts_t parts = {first_cta_of_item, item_ctas, 0};
      if (item_ctas == 0) {
        parts.first_cta = owner(line_begin);
        parts.count = owner(line_begin + r.steps - 1) - parts.first_cta + 1;
        parts.first_part = share(parts.first_cta) >= line_begin ? 0 : 1;
      }
      write = Combine<C>(p, counter, item_begin == begin ? 0 : 1, parts, rows, columns);
    }
    if (write) WriteRows<C>(p, r, group, head, block, v_signs, rows, columns);
    __syncthreads();  // the next item reuses rows
    item_begin = item_end;
  }
}

}  // namespace decode_detail
}  // namespace turbokv

#endif  // TURBOKV_DECODE_KERNEL_CUH_
