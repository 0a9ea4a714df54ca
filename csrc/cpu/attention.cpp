// Attention on CPUs, forward: blocks of queries pass over the keys they see, kKeys at a time, with an online softmax
// (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Bound by the two products,
// 4 · dim operations per score, and by one exponential per score. A panel of queries goes from scores to sums while
// its scores are in the L1 cache; the panels of a block share the keys and values that come from further away.
#include "attention.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kPanels = 4;  // of queries, in a block
constexpr int kQueries = kPanels * kPanel;

// Keys [kKeys, dim] and values transposed [dim_v, kKeys] of each block and head.
template <typename E>
struct PackedKeys : KeyTiles {
  Buffer<E> k, vt;
  Buffer<bool> finite;  // whether a block's values are

  template <typename T>
  PackedKeys(const Attention& a, T) : KeyTiles(a), k(at(count())), vt(at_v(count())), finite(count()) {
    pack_each<T>(a, [&](int64_t tile, const T* ks, const T* vs, int64_t rows, int64_t filled) {
      copy_rows(ks, a.k.token, rows, a.dim, k + at(tile), filled, dim);
      finite[tile] = copy_transposed(vs, a.v.token, rows, a.dim_v, vt + at_v(tile), filled, dim_v);
    });
  }
};

// The running softmax of a panel of queries: the highest score so far and the sum of e^(score - highest), and the sum
// of values weighted by those, transposed: [dim, kPanel].
struct Running {
  vfloat highest[2], sum[2];
  float* values;

  // A sink is a key seen before all others, without a value.
  void clear(const float* sink, int64_t dim) {
    for (vfloat& x : highest) x = broadcast(sink ? *sink : -kInfinity);
    for (vfloat& x : sum) x = broadcast(sink ? 1.f : 0.f);
    std::memset(values, 0, dim * kPanel * sizeof(float));
  }

  void scale_values(int half, vfloat factor, int64_t dim) {
    for (float* o = values + half * kLanes; o < values + dim * kPanel; o += kPanel) store(o, load(o) * factor);
  }
};

// Scores of a panel of queries to some keys, which become probabilities: B of the product with the values. In float32
// that is laid out like the scores and takes their place.
template <typename E>
struct Scores {
  float* scores;     // [kKeys, kPanel]
  bfloat16* packed;  // the same

  explicit Scores(Arena& arena)
      : scores(arena.array<float>(kKeys * kPanel)), packed(arena.array<bfloat16>(sizeof(E) == 2 ? kKeys * kPanel : 0)) {}

  E* probs() {
    if constexpr (sizeof(E) == 2) {
      return packed;
    } else {
      return scores;
    }
  }

  // `depth` rows of probs are written, those after `keys` as 0; what was summed before is scaled to the highest score.
  template <bool kMasked>
  void to_probs(const Attention& a, const Band& band, int64_t ahead, int64_t keys, int64_t depth, int64_t dim,
                Running& running) {
    const float scale = a.scale;
    for (int half = 0; half < 2; ++half) {
      float* column = scores + half * kLanes;
      // Scaled here, or by the multiply-add below: the same of every key, or a row's bits would depend on its neighbours.
      const bool kept = a.softcap || !(scale > 0.f);
      const auto score = [&](int64_t key) {
        vfloat s = load(column + key * kPanel);
        if (kept) s = a.softcap ? tanh(s * (a.scale / a.softcap)) * a.softcap : s * scale;
        return kMasked ? band.select(ahead + key, half * kLanes, s, -kInfinity) : s;
      };
      vfloat top = running.highest[half];
      if (kMasked || kept) {
        vfloat best = broadcast(-kInfinity);
        for (int64_t key = 0; key < keys; ++key) {
          const vfloat s = score(key);
          store(column + key * kPanel, s);
          best = maximum(best, s);
        }
        top = maximum(kept ? best : best * scale, top);
      } else {
        vfloat tops[4];  // of what the scale still multiplies
        for (vfloat& t : tops) t = load(column);
        int64_t key = 1;
        for (; key + 4 <= keys; key += 4)
          for (int i = 0; i < 4; ++i) tops[i] = maximum(tops[i], load(column + (key + i) * kPanel));
        for (; key < keys; ++key) tops[0] = maximum(tops[0], load(column + key * kPanel));
        top = maximum(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])) * scale, top);
      }
      const vfloat base = top == -kInfinity ? vfloat{} : top;
      const vfloat factor = exp_nonpositive(running.highest[half] - base);
      if (any_greater(broadcast(1.f), factor)) running.scale_values(half, factor, dim);
      running.highest[half] = top;
      const auto prob = [&](int64_t key) {
        const vfloat s = load(column + key * kPanel);
        const vfloat p = exp_nonpositive(kept ? s - base : s * scale - base);
        if (kMasked) store(column + key * kPanel, p);  // for add_visible
        return p;
      };
      vfloat sums[2] = {running.sum[half] * factor, vfloat{}};
      E* out = probs() + half * kLanes * kStep<E>;
      int64_t key = 0;
      for (; key + 2 <= keys; key += 2, out += 2 * kPanel) {
        const vfloat first = prob(key), second = prob(key + 1);
        sums[0] += first;
        sums[1] += second;
        if constexpr (kStep<E> == 2) {
          store_steps(out, first, second);
        } else {
          store(out, first);
          store(out + kPanel, second);
        }
      }
      for (; key < depth; key += kStep<E>, out += kPanel * kStep<E>) {
        const vfloat last = key < keys ? prob(key) : vfloat{};
        sums[0] += last;
        store_steps(out, last, vfloat{});
      }
      running.sum[half] = sums[0] + sums[1];
    }
  }
};

// What the product would give, but a value that is not finite reaches only the queries that see it.
template <typename E>
void add_visible(const Band& band, int64_t ahead, int64_t keys, const float* probs, const E* vt, int64_t dim,
                 float* out) {
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t key = 0; key < keys; ++key) {
      E same[kLanes];
      for (int i = 0; i < kLanes; ++i) same[i] = vt[d * kKeys + key];
      const vfloat value = load(same);
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        float* o = out + d * kPanel + v;
        store(o, load(o) + band.select(ahead + key, v, load(probs + key * kPanel + v) * value, 0.f));
      }
    }
}

// Of a thread.
template <typename E>
struct Scratch {
  Scores<E> scores;
  E* queries;  // packed, [kQueries, dim]
  Running panels[kPanels];

  Scratch(Arena& arena, int64_t dim, int64_t dim_v) : scores(arena), queries(arena.array<E>(kQueries * dim)) {
    for (Running& running : panels) running.values = arena.array<float>(dim_v * kPanel);
  }
};

template <typename T>
void forward(const AttentionForward& a) {
  using E = typename TileOf<T>::Type;
  const PackedKeys<E> packed(a, T{});
  const Blocks blocks(a, &Sequence::len_q, kQueries);
  const int64_t dim = packed.dim, dim_v = packed.dim_v, group = a.group();
  const PerThread<Scratch<E>> memory(dim, dim_v);
  const Band band(a);
  expect_large_write(a.out, a.tokens_q() * a.heads * a.dim_v * static_cast<int64_t>(sizeof(T)));

#pragma omp parallel
  {
    const Tiles tiles;
    Arena arena = memory.mine();
    Scratch<E> scratch(arena, dim, dim_v);
    Scores<E>& scores = scratch.scores;
    E* const packed_queries = scratch.queries;
    Running* const panels = scratch.panels;

#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < blocks.count() * a.heads; ++item) {
      const auto [sequence, head, block] = blocks.place(item, a.heads);
      const Sequence s(a, sequence);
      const int64_t first = block * kQueries, count = least(kQueries, s.len_q - first);
      const T* q = token_of<T>(a, a.q, s.first_q, s.index, head) + first * a.q.token;
      pack_columns(q, a.q.token, count, a.dim, packed_queries, round_up(count, kPanel), dim);
      for (Running& running : scratch.panels) running.clear(a.sinks ? a.sinks + head : nullptr, dim_v);

      const Range range = visible(a, s, first, count);
      for (int64_t j = range.begin / kKeys; j * kKeys < range.end; ++j) {
        const int64_t tile = packed.tile(sequence, head / group, j);
        const E *k = packed.k + packed.at(tile), *vt = packed.vt + packed.at_v(tile);
        for (int64_t start = 0; start < count; start += kPanel) {
          const int64_t queries = least(kPanel, count - start);
          const Range seen = visible(a, s, first + start, queries);
          const int64_t keys = least(kKeys, seen.end - j * kKeys);
          if (keys <= 0 || seen.begin >= (j + 1) * kKeys) continue;
          Running& running = panels[start / kPanel];
          matmul(round_up(keys, kRowUnit), kPanel, dim, k, dim, packed_queries + start * dim, scores.scores, kPanel, false);

          const int64_t ahead = j * kKeys - (first + start + s.offset()), depth = round_up(keys, kDepthUnit<E>);
          const bool masked = !band.covers(ahead, keys, queries);
          if (masked) {
            scores.template to_probs<true>(a, band, ahead, keys, depth, dim_v, running);
          } else {
            scores.template to_probs<false>(a, band, ahead, keys, depth, dim_v, running);
          }
          if (masked && !packed.finite[tile]) {
            add_visible(band, ahead, keys, scores.scores, vt, a.dim_v, running.values);
          } else {
            matmul(dim_v, kPanel, depth, vt, kKeys, scores.probs(), running.values, kPanel, true);
          }
        }
      }

      float* lse = a.lse ? a.lse + lse_at(a, s, head) + first : nullptr;
      T* out = static_cast<T*>(a.out) + ((s.first_q + first) * a.heads + head) * a.dim_v;
      for (int64_t start = 0; start < count; start += kPanel) {
        Running& running = panels[start / kPanel];
        const int64_t queries = least(kPanel, count - start);
        for (int half = 0; half < 2; ++half) {
          const vfloat sum = running.sum[half];
          running.scale_values(half, sum == 0.f ? vfloat{} : 1.f / sum, dim_v);
          for (int64_t i = half * kLanes; lse && i < least(queries, (half + 1) * kLanes); ++i)
            lse[start + i] = running.highest[half][i % kLanes] + __builtin_logf(sum[i % kLanes]);
        }
        put_transposed(running.values, kPanel, queries, a.dim_v, out + start * a.heads * a.dim_v, a.heads * a.dim_v);
      }
    }
  }
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  with_type(a.dtype, [&](auto tag) { forward<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
