// Attention on CPUs, backward (Dao 2023, arXiv:2307.08691, algorithm 2): five products per block of scores.
//   p = e^(score - lse),  ds = p (dout vᵀ - delta) scale,  dv = pᵀ dout,  dk = dsᵀ q,  dq = ds k
// One thread takes a whole sequence of one key/value head, where there are enough of those for all threads; else dq
// and then dk, dv are computed in blocks of their own, which takes seven products. Both add in the same order, so
// that the result does not depend on the number of threads.
#include "attention.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kQueries = 64;  // of a block: its scores, 48 KiB, stay in the L2 cache
static_assert(kQueries % kPanel == 0, "blocks are whole panels");

// Keys [kKeys, dim] and transposed [dim, kKeys], and values [kKeys, dim_v], of each block and head.
template <typename E>
struct PackedKeys : KeyTiles {
  Buffer<E> k, v, kt;

  template <typename T>
  PackedKeys(const Attention& a, T) : KeyTiles(a), k(at(count())), v(at_v(count())), kt(at(count())) {
    pack_each<T>(a, [&](int64_t tile, const T* ks, const T* vs, int64_t rows, int64_t filled) {
      copy_rows(ks, a.k.token, rows, a.dim, k + at(tile), filled, dim);
      copy_rows(vs, a.v.token, rows, a.dim_v, v + at_v(tile), filled, dim_v);
      copy_transposed(ks, a.k.token, rows, a.dim, kt + at(tile), filled, dim);
    });
  }
};

// A block of queries as operands, and its dq.
template <typename T, typename E>
class Queries {
 public:
  int64_t first, count, queries;  // queries: count in whole panels
  float *lse, *delta;      // [kQueries]
  E *qt, *dot, *q, *dout;  // B of products: transposed with the heads' dim as depth, and with the queries as depth
  float* dqt;              // [dim, kQueries]

  void place(Arena& arena, int64_t dim, int64_t dim_v) {
    dim_ = dim, dim_v_ = dim_v;
    lse = arena.array<float>(kQueries), delta = arena.array<float>(kQueries);
    qt = arena.array<E>(kQueries * dim), q = arena.array<E>(kQueries * dim);
    dot = arena.array<E>(kQueries * dim_v), dout = arena.array<E>(kQueries * dim_v);
    dqt = arena.array<float>(kQueries * dim);
  }

  // Copies the queries from `from` on, and clears dq.
  void take(const AttentionBackward& a, const Sequence& s, int64_t head, int64_t from, bool for_keys) {
    first = from;
    count = least(kQueries, s.len_q - first);
    queries = round_up(count, kPanel);
    const T* qs = token_of<T>(a, a.q, s.first_q, s.index, head) + first * a.q.token;
    const T* douts = token_of<T>(a, a.dout, s.first_q, s.index, head) + first * a.dout.token;
    pack_columns(qs, a.q.token, count, a.dim, qt, queries, dim_);
    pack_columns(douts, a.dout.token, count, a.dim_v, dot, queries, dim_v_);
    if (for_keys) {
      pack_rows(qs, a.q.token, count, a.dim, q, queries, dim_);
      pack_rows(douts, a.dout.token, count, a.dim_v, dout, queries, dim_v_);
    }
    const int64_t at = lse_at(a, s, head) + first;
    for (int64_t i = 0; i < queries; ++i) {
      // Infinity makes the probabilities 0: of what lies beyond the queries, and of a query that sees nothing.
      const float given = i < count ? a.lse[at + i] : kInfinity;
      lse[i] = given == -kInfinity ? kInfinity : given;
      delta[i] = i < count ? a.delta[at + i] : 0.f;
    }
    std::memset(dqt, 0, dim_ * kQueries * sizeof(float));
  }

  void put_dq(const AttentionBackward& a, const Sequence& s, int64_t head) const {
    T* dq = static_cast<T*>(a.dq) + ((s.first_q + first) * a.heads + head) * a.dim;
    put_transposed(dqt, kQueries, count, a.dim, dq, a.heads * a.dim);
  }

 private:
  int64_t dim_, dim_v_;
};

// A block of scores and its gradients.
template <typename T, typename E>
class Tile {
 public:
  Tile(Arena& arena, const AttentionBackward& a, const PackedKeys<E>& packed)
      : a_(a),
        packed_(packed),
        band_(a),
        scores_(arena.array<float>(kKeys * kQueries)),
        dprobs_(arena.array<float>(kKeys * kQueries)),
        probs_(arena.array<E>(kKeys * kQueries)),
        dscores_(arena.array<E>(kKeys * kQueries)),
        dscores_packed_(arena.array<E>(kKeys * kQueries)) {}

  // Adds what block j of the keys gives: to dq where `for_queries`; to that block's dk [keys, dim] and dv [keys, dim_v]
  // where those are not null.
  void add(Queries<T, E>& q, const Sequence& s, int64_t kv_head, int64_t j, bool for_queries, float* dk, float* dv) {
    const Range range = visible(a_, s, q.first, q.count);
    const int64_t keys = least(kKeys, range.end - j * kKeys), dim = packed_.dim, dim_v = packed_.dim_v;
    if (keys <= 0 || j < range.begin / kKeys) return;
    const int64_t ahead = j * kKeys - (q.first + s.offset()), tile = packed_.tile(s.index, kv_head, j);
    const int64_t rows = round_up(keys, kRowUnit), depth = round_up(keys, kDepthUnit<E>);
    matmul(rows, q.queries, dim, packed_.k + packed_.at(tile), dim, q.qt, scores_, kQueries, false);
    matmul(rows, q.queries, dim_v, packed_.v + packed_.at_v(tile), dim_v, q.dot, dprobs_, kQueries, false);
    if (band_.covers(ahead, keys, q.count)) {
      differentiate<false>(q, ahead, keys, rows, depth);
    } else {
      differentiate<true>(q, ahead, keys, rows, depth);
    }
    if (for_queries) {
      matmul(dim, q.queries, depth, packed_.kt + packed_.at(tile), kKeys, dscores_packed_, q.dqt, kQueries, true);
    }
    if (dk) {
      matmul(rows, dim_v, q.queries, probs_, kQueries, q.dout, dv, dim_v, true);
      matmul(rows, dim, q.queries, dscores_, kQueries, q.q, dk, dim, true);
    }
  }

 private:
  // probs and dscores, row-major, and dscores as B of a product whose depth the keys are.
  template <bool kMasked>
  void differentiate(const Queries<T, E>& q, int64_t ahead, int64_t keys, int64_t rows, int64_t depth) {
    const float scale = a_.scale;
    const float *scores = scores_, *dprobs = dprobs_;  // of their own: a store might change what a member points to
    E *probs = probs_, *dscores = dscores_, *dscores_packed = dscores_packed_;
    for (int64_t v = 0; v < q.queries / kLanes; ++v) {
      const vfloat lse = load(q.lse + v * kLanes), delta = load(q.delta + v * kLanes);
      E* packed = dscores_packed + v / 2 * depth * kPanel + v % 2 * kLanes * kStep<E>;
      const auto dscore = [&](int64_t key) {
        const int64_t at = key * kQueries + v * kLanes;
        vfloat p, ds;
        if (a_.softcap) {
          const vfloat t = tanh(load(scores + at) * (a_.scale / a_.softcap));
          p = exp_nonpositive(t * a_.softcap - lse);
          ds = p * (load(dprobs + at) - delta) * a_.scale * (1.f - t * t);
        } else {
          p = exp_nonpositive(load(scores + at) * scale - lse);
          ds = p * (load(dprobs + at) - delta) * a_.scale;
        }
        if (kMasked) {
          p = band_.select(ahead + key, v * kLanes, p, 0.f);
          ds = band_.select(ahead + key, v * kLanes, ds, 0.f);
        }
        store(probs + at, p);
        store(dscores + at, ds);
        return ds;
      };
      for (int64_t key = 0; key < depth; key += kStep<E>, packed += kPanel * kStep<E>) {
        const vfloat first = key < keys ? dscore(key) : vfloat{};
        store_steps(packed, first, kStep<E> == 2 && key + 1 < keys ? dscore(key + 1) : vfloat{});
      }
      for (int64_t key = keys; key < rows; ++key) {  // rows that only fill a tile
        store(probs + key * kQueries + v * kLanes, vfloat{});
        store(dscores + key * kQueries + v * kLanes, vfloat{});
      }
    }
  }

  const AttentionBackward& a_;
  const PackedKeys<E>& packed_;
  const Band band_;
  float *const scores_, *const dprobs_;  // [kKeys, kQueries], all
  E *const probs_, *const dscores_, *const dscores_packed_;
};

// Keys pass by a few blocks of queries together, which stay in the L2 cache: at most so many, and of so many bytes.
constexpr int64_t kMostBlocks = 8, kCache = 400 << 10;

// Of a thread.
template <typename T, typename E>
struct Scratch {
  Tile<T, E> tile;
  float *dk, *dv;  // of `room` keys: [room, dim] and [room, dim_v]
  int64_t together;
  Queries<T, E> blocks[kMostBlocks];

  Scratch(Arena& arena, const AttentionBackward& a, const PackedKeys<E>& packed, int64_t room, int64_t most_blocks)
      : tile(arena, a, packed),
        dk(arena.array<float>(room * packed.dim)),
        dv(arena.array<float>(room * packed.dim_v)) {
    const int64_t before = arena.bytes();
    blocks[0].place(arena, packed.dim, packed.dim_v);
    together = clamp(kCache / (arena.bytes() - before), 1, most_blocks);
    for (int64_t i = 1; i < together; ++i) blocks[i].place(arena, packed.dim, packed.dim_v);
  }
};

template <typename T>
void put_rows(const float* x, int64_t rows, int64_t cols, int64_t x_stride, T* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += kLanes) {
      const vfloat v = load(x + r * x_stride + c);
      T* p = out + r * stride + c;
      cols - c >= kLanes ? store(p, v) : store_partial(p, v, cols - c);
    }
}

// dk and dv of the keys [first, first + rows).
template <typename T>
void put_keys(const AttentionBackward& a, const KeyTiles& tiles, const Sequence& s, int64_t kv_head, int64_t first,
              int64_t rows, const float* dk, const float* dv) {
  const int64_t row = (s.first_k + first) * a.kv_heads + kv_head;
  put_rows(dk, rows, a.dim, tiles.dim, static_cast<T*>(a.dk) + row * a.dim, a.kv_heads * a.dim);
  put_rows(dv, rows, a.dim_v, tiles.dim_v, static_cast<T*>(a.dv) + row * a.dim_v, a.kv_heads * a.dim_v);
}

// delta = dout · out - dlse, per query and head.
template <typename T>
void compute_delta(const AttentionBackward& a) {
  for (int64_t i = 0; i < a.sequences; ++i) {
    const Sequence s(a, i);
#pragma omp parallel for schedule(static) if (s.len_q * a.heads * a.dim_v > (1 << 15))
    for (int64_t row = 0; row < s.len_q * a.heads; ++row) {
      const int64_t query = row / a.heads, head = row % a.heads, at = lse_at(a, s, head) + query;
      const T* dout = token_of<T>(a, a.dout, s.first_q, s.index, head) + query * a.dout.token;
      const T* out = static_cast<const T*>(a.out) + (s.first_q * a.heads + row) * a.dim_v;
      vfloat dot{};
      for (int64_t c = 0; c < a.dim_v; c += kLanes) {
        dot += load_some(dout + c, a.dim_v - c) * load_some(out + c, a.dim_v - c);
      }
      a.delta[at] = sum(dot) - (a.dlse ? a.dlse[at] : 0.f);
    }
  }
}

// A whole sequence of one key/value head at a time. The keys' gradients are what most memory traffic is about: the
// blocks of queries that keys pass by together read and write them once.
template <typename T, typename E>
void in_one_pass(const AttentionBackward& a, const PackedKeys<E>& packed, int64_t longest) {
  const int64_t group = a.group(), dim = packed.dim, dim_v = packed.dim_v, room = round_up(longest, kKeys);
  const PerThread<Scratch<T, E>> memory(a, packed, room, kMostBlocks);
#pragma omp parallel
  {
    const Tiles tiles;
    Arena arena = memory.mine();
    Scratch<T, E> scratch(arena, a, packed, room, kMostBlocks);
    Tile<T, E>& tile = scratch.tile;
    Queries<T, E>* const blocks = scratch.blocks;
    float *const dk = scratch.dk, *const dv = scratch.dv;
    const int64_t together = scratch.together;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < a.sequences * a.kv_heads; ++item) {
      const Sequence s(a, item / a.kv_heads);
      const int64_t kv_head = item % a.kv_heads, used = round_up(s.len_k, kKeys);
      std::memset(dk, 0, used * dim * sizeof(float));
      std::memset(dv, 0, used * dim_v * sizeof(float));
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t first = 0; first < s.len_q; first += together * kQueries) {
          const int64_t queries = least(together * kQueries, s.len_q - first), count = blocks_of(queries, kQueries);
          for (int64_t i = 0; i < count; ++i) blocks[i].take(a, s, head, first + i * kQueries, true);
          const Range range = visible(a, s, first, queries);
          for (int64_t j = range.begin / kKeys; j * kKeys < range.end; ++j)
            for (int64_t i = 0; i < count; ++i)
              tile.add(blocks[i], s, kv_head, j, true, dk + j * kKeys * dim, dv + j * kKeys * dim_v);
          for (int64_t i = 0; i < count; ++i) blocks[i].put_dq(a, s, head);
        }
      put_keys<T>(a, packed, s, kv_head, 0, s.len_k, dk, dv);
    }
  }
}

// A block of queries, and then a block of keys, at a time.
template <typename T, typename E>
void in_two_passes(const AttentionBackward& a, const PackedKeys<E>& packed) {
  const int64_t group = a.group(), dim = packed.dim, dim_v = packed.dim_v;
  const Blocks blocks(a, &Sequence::len_q, kQueries);
  const PerThread<Scratch<T, E>> memory(a, packed, kKeys, 1);
#pragma omp parallel
  {
    const Tiles tiles;
    Arena arena = memory.mine();
    Scratch<T, E> scratch(arena, a, packed, kKeys, 1);
    Tile<T, E>& tile = scratch.tile;
    Queries<T, E>& queries = scratch.blocks[0];
    float *const dk = scratch.dk, *const dv = scratch.dv;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < blocks.count() * a.heads; ++item) {
      const auto [sequence, head, block] = blocks.place(item, a.heads);
      const Sequence s(a, sequence);
      queries.take(a, s, head, block * kQueries, false);
      const Range range = visible(a, s, queries.first, queries.count);
      for (int64_t j = range.begin / kKeys; j * kKeys < range.end; ++j)
        tile.add(queries, s, head / group, j, true, nullptr, nullptr);
      queries.put_dq(a, s, head);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < packed.blocks.count() * a.kv_heads; ++item) {
      const auto [sequence, kv_head, j] = packed.blocks.place(item, a.kv_heads);
      const Sequence s(a, sequence);
      const int64_t rows = least(kKeys, s.len_k - j * kKeys);
      std::memset(dk, 0, kKeys * dim * sizeof(float));
      std::memset(dv, 0, kKeys * dim_v * sizeof(float));
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t first = 0; first < s.len_q; first += kQueries) {
          const Range range = visible(a, s, first, least(kQueries, s.len_q - first));
          if (j < range.begin / kKeys || j * kKeys >= range.end) continue;
          queries.take(a, s, head, first, true);
          tile.add(queries, s, kv_head, j, false, dk, dv);
        }
      put_keys<T>(a, packed, s, kv_head, j * kKeys, rows, dk, dv);
    }
  }
}

template <typename T>
void backward(const AttentionBackward& a) {
  using E = typename TileOf<T>::Type;
  compute_delta<T>(a);
  const PackedKeys<E> packed(a, T{});
  const int64_t bytes = sizeof(T);
  expect_large_write(a.dq, a.tokens_q() * a.heads * a.dim * bytes);
  expect_large_write(a.dk, a.tokens_k() * a.kv_heads * a.dim * bytes);
  expect_large_write(a.dv, a.tokens_k() * a.kv_heads * a.dim_v * bytes);

  const int64_t threads = most_threads();
  int64_t longest = 0;
  double all = 0, largest = 0;  // scores, of all sequences and of the one with the most
  for (int64_t i = 0; i < a.sequences; ++i) {
    const Sequence s(a, i);
    const double scores = static_cast<double>(s.len_q) * s.len_k;
    all += scores * a.kv_heads;
    largest = scores > largest ? scores : largest;
    longest = most(longest, s.len_k);
  }
  // With one pass a thread may wait for the largest sequences; with two there are 7/5 as many products.
  const double rounds = static_cast<double>((a.sequences * a.kv_heads + threads - 1) / threads);
  if (rounds * largest * threads <= 1.4 * all) {
    in_one_pass<T>(a, packed, longest);
  } else {
    in_two_passes<T>(a, packed);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& a) {
  with_type(a.dtype, [&](auto tag) { backward<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
