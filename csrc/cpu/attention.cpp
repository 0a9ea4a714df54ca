// Attention on CPUs, forward: blocks of 64 queries pass over the keys they see, 96 at a time, with an online softmax
// (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Bound by the two products,
// 4 · dim operations per score, and by one exponential per score.
#include "attention.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// Keys [kKeys, dim] and values transposed [dim, kKeys] of each block and head.
template <typename E>
struct PackedKeys {
  int64_t dim, heads;
  Blocks blocks;
  Buffer<E> k, vt;
  Buffer<bool> finite;  // whether a block's values are

  template <typename T>
  PackedKeys(const Attention& a, T)
      : dim(round_up(a.dim, kPanel)),
        heads(a.kv_heads),
        blocks(a, &Sequence::len_k, kKeys),
        k(blocks.count() * heads * kKeys * dim),
        vt(blocks.count() * heads * kKeys * dim),
        finite(blocks.count() * heads) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < blocks.count() * heads; ++i) {
      const auto [sequence, head, block] = blocks.place(i, heads);
      const Sequence s(a, sequence);
      const int64_t first = block * kKeys, rows = least(kKeys, s.len_k - first), at = tile(sequence, head, block);
      const int64_t filled = round_up(rows, kPanel);
      const T* ks = token_of<T>(a, a.k, s.first_k, s.index, head) + first * a.k.token;
      const T* vs = token_of<T>(a, a.v, s.first_k, s.index, head) + first * a.v.token;
      copy_rows(ks, a.k.token, rows, a.dim, k + at, filled, dim);
      finite[at / (kKeys * dim)] = copy_transposed(vs, a.v.token, rows, a.dim, vt + at, filled, dim);
    }
  }

  int64_t tile(int64_t s, int64_t head, int64_t block) const {
    return ((blocks.first(s) + block) * heads + head) * kKeys * dim;
  }
};

// The running softmax of a block of queries: the highest score so far the sum of
// e^(score - highest), and the sum of values weighted by those, transposed.
template <typename E>
struct Running {
  vfloat highest[kQueries / kLanes], sum[kQueries / kLanes];
  alignas(64) float scores[kKeys * kQueries];
  alignas(64) E probs[kKeys * kQueries];

  // Scores of `keys` keys become probabilities, less a factor that the returned ones correct in what was summed
  // before: B of the product with the values. `depth` rows of it are written, those after `keys` as 0.
  template <bool kMasked>
  void add(const Attention& a, const Band& band, int64_t ahead, int64_t keys, int64_t depth, int64_t queries,
           vfloat (&factor)[kQueries / kLanes]) {
    const float scale = a.scale;
    for (int64_t v = 0; v < queries / kLanes; ++v) {
      float* column = scores + v * kLanes;
      const auto score = [&](int64_t key) {
        vfloat s = load(column + key * kQueries);
        s = a.softcap ? tanh(s * (a.scale / a.softcap)) * a.softcap : s * scale;
        return kMasked ? band.select(ahead + key, v * kLanes, s, -kInfinity) : s;
      };
      vfloat top = highest[v];
      const bool kept = kMasked || a.softcap || scale < 0.f;
      if (kept) {
        for (int64_t key = 0; key < keys; ++key) {
          const vfloat s = score(key);
          store(column + key * kQueries, s);
          top = maximum(top, s);
        }
      } else {
        vfloat tops[4];  // of what the scale still multiplies
        for (vfloat& t : tops) t = load(column);
        int64_t key = 1;
        for (; key + 4 <= keys; key += 4)
          for (int i = 0; i < 4; ++i) tops[i] = maximum(tops[i], load(column + (key + i) * kQueries));
        for (; key < keys; ++key) tops[0] = maximum(tops[0], load(column + key * kQueries));
        top = maximum(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])) * scale, top);
      }
      const vfloat base = top == -kInfinity ? vfloat{} : top;
      factor[v] = exp_nonpositive(highest[v] - base);
      highest[v] = top;
      const auto prob = [&](int64_t key) {
        const vfloat s = load(column + key * kQueries);
        const vfloat p = exp_nonpositive(kept ? s - base : s * scale - base);
        if (kMasked) store(column + key * kQueries, p);  // for add_visible
        return p;
      };
      vfloat sums[2] = {sum[v] * factor[v], vfloat{}};
      E* out = probs + v / 2 * depth * kPanel + v % 2 * kLanes * kStep<E>;
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
      sum[v] = sums[0] + sums[1];
    }
  }
};

// What the product would give, but a value that is not finite reaches only the queries that see it.
template <typename E>
void add_visible(const Band& band, int64_t ahead, int64_t keys, int64_t queries, const float* probs, const E* vt,
                 int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t key = 0; key < keys; ++key) {
      E same[kLanes];
      for (int i = 0; i < kLanes; ++i) same[i] = vt[d * kKeys + key];
      const vfloat value = load(same);
      for (int64_t v = 0; v < queries; v += kLanes) {
        float* o = out + d * kQueries + v;
        store(o, load(o) + band.select(ahead + key, v, load(probs + key * kQueries + v) * value, 0.f));
      }
    }
}

template <typename T>
void forward(const AttentionForward& a) {
  using E = typename TileOf<T>::Type;
  const PackedKeys<E> packed(a, T{});
  const Blocks blocks(a, &Sequence::len_q, kQueries);
  const int64_t dim = packed.dim, group = a.heads / a.kv_heads;
  const Band band(a);
  expect_large_write(a.out, a.tokens_q() * a.heads * a.dim * static_cast<int64_t>(sizeof(T)));

#pragma omp parallel
  {
    const Tiles tiles;
    Running<E> running;
    alignas(64) E queries_packed[kQueries * 256];
    alignas(64) float sums[256 * kQueries];

#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < blocks.count() * a.heads; ++item) {
      const auto [sequence, head, block] = blocks.place(item, a.heads);
      const Sequence s(a, sequence);
      const int64_t first = block * kQueries;
      const int64_t count = least(kQueries, s.len_q - first), queries = round_up(count, kPanel);
      const T* q = token_of<T>(a, a.q, s.first_q, s.index, head) + first * a.q.token;
      pack_columns(q, a.q.token, count, a.dim, queries_packed, queries, dim);
      std::memset(sums, 0, dim * kQueries * sizeof(float));
      // A sink is a key seen before all others, without a value.
      for (vfloat& x : running.highest) x = broadcast(a.sinks ? a.sinks[head] : -kInfinity);
      for (vfloat& x : running.sum) x = broadcast(a.sinks ? 1.f : 0.f);

      const Range range = visible(a, s, first, count);
      for (int64_t j = range.begin / kKeys; j * kKeys < range.end; ++j) {
        const int64_t keys = least(kKeys, range.end - j * kKeys);
        const int64_t depth = round_up(keys, kDepthUnit<E>);
        const int64_t ahead = j * kKeys - (first + s.offset());
        const int64_t tile = packed.tile(sequence, head / group, j);
        const E *k = packed.k + tile, *vt = packed.vt + tile;
        matmul(round_up(keys, kRowUnit), queries, dim, k, dim, queries_packed, running.scores, kQueries, false);

        const bool masked = !band.covers(ahead, keys, count);
        vfloat factor[kQueries / kLanes];
        if (masked) {
          running.template add<true>(a, band, ahead, keys, depth, queries, factor);
        } else {
          running.template add<false>(a, band, ahead, keys, depth, queries, factor);
        }
        for (int64_t v = 0; v < queries / kLanes; ++v) {
          if (!any_greater(broadcast(1.f), factor[v])) continue;
          for (int64_t d = 0; d < dim; ++d) {
            float* o = sums + d * kQueries + v * kLanes;
            store(o, load(o) * factor[v]);
          }
        }
        if (masked && !packed.finite[tile / (kKeys * dim)]) {
          add_visible(band, ahead, keys, queries, running.scores, vt, a.dim, sums);
        } else {
          matmul(dim, queries, depth, vt, kKeys, running.probs, sums, kQueries, true);
        }
      }

      float* lse = a.lse + lse_at(a, s, head) + first;
      for (int64_t v = 0; v < queries / kLanes; ++v) {
        const vfloat sum = running.sum[v], inverse = sum == 0.f ? vfloat{} : 1.f / sum;
        for (int64_t d = 0; d < dim; ++d) {
          float* o = sums + d * kQueries + v * kLanes;
          store(o, load(o) * inverse);
        }
        for (int64_t i = v * kLanes; i < least(count, (v + 1) * kLanes); ++i)
          lse[i] = running.highest[v][i % kLanes] + __builtin_logf(sum[i % kLanes]);
      }
      T* out = static_cast<T*>(a.out) + ((s.first_q + first) * a.heads + head) * a.dim;
      put_transposed(sums, count, a.dim, out, a.heads * a.dim);
    }
  }
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  with_type(a.dtype, [&](auto tag) { forward<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
