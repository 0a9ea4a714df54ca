// Attention of a few queries to many keys, on CPUs. Bound by memory: each key and value is read once, for all
// queries of the heads that share it. Keys are split in parts of a fixed length, so that one sequence occupies all
// threads; the parts' softmaxes are joined at the end. A row of the output is computed from its query alone, in an order
// that the positions of the keys fix: threads, the batch, its capacity and the other queries change no bit of it.
#include "attention.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kPart = 256;     // keys that a thread takes at a time
constexpr int kTile = kLanes;  // keys whose scores make a vector; a page holds whole tiles
constexpr int64_t kParallelProducts = 1 << 16;

// Rows and vectors of sums that stay in registers.
#if defined(__AVX512F__)
constexpr int kSumRows = 6, kSumVectors = 4;
#else
constexpr int kSumRows = 4, kSumVectors = 2;
#endif

// Sums of kLanes vectors, one in each lane: as transpose, but lanes that meet are added at once.
inline vfloat sums(vfloat (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const vuint32 a = (vuint32)rows[i], b = (vuint32)rows[i + half];
      rows[i] = (vfloat)interleave(a, b, false) + (vfloat)interleave(a, b, true);
    }
  return rows[0];
}

// c + a · b, lane by lane, of vectors of E: of float32 one product, of bfloat16 two.
template <typename E>
inline vfloat add_products(vfloat c, vuint32 a, vuint32 b) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(E) == 2) return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  return c + (vfloat)a * (vfloat)b;
}

// out[row] += sum of p[row][i] * v[i] over the values [begin, end), one after another.
template <int kRows, int kVectors, typename X>
inline void add_values(const float* p, const X* v, int64_t step, int64_t begin, int64_t end, float* out, int64_t stride) {
  vfloat sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) sum[r][n] = load(out + r * stride + n * kLanes);
  for (int64_t i = begin; i < end; ++i) {
    vfloat value[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) value[n] = load(v + i * step + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vfloat prob = broadcast(p[r * kPart + i]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[r][n] += prob * value[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) store(out + r * stride + n * kLanes, sum[r][n]);
}

template <int kRows, typename X>
inline void add_values(const float* p, const X* v, int64_t step, int64_t begin, int64_t end, float* out, int64_t stride,
                       int64_t dim) {
  int64_t d = 0;
  for (; d + kSumVectors * kLanes <= dim; d += kSumVectors * kLanes)
    add_values<kRows, kSumVectors>(p, v + d, step, begin, end, out + d, stride);
  for (; d < dim; d += kLanes) add_values<kRows, 1>(p, v + d, step, begin, end, out + d, stride);
}

// Any number of rows, in blocks of about the same size.
template <int kRows = kSumRows, typename X>
inline void add_values(int64_t rows, const float* p, const X* v, int64_t step, int64_t begin, int64_t end, float* out,
                       int64_t stride, int64_t dim) {
  if constexpr (kRows == 1) {
    for (int64_t r = 0; r < rows; ++r) add_values<1>(p + r * kPart, v, step, begin, end, out + r * stride, stride, dim);
  } else {
    const int64_t blocks = blocks_of(rows, kSumRows);
    if (blocks_of(rows, blocks) < kRows) return add_values<kRows - 1>(rows, p, v, step, begin, end, out, stride, dim);
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
      add_values<kRows>(p + r * kPart, v, step, begin, end, out + r * stride, stride, dim);
    if (r < rows) add_values<kRows - 1>(rows - r, p + r * kPart, v, step, begin, end, out + r * stride, stride, dim);
  }
}

template <typename T>
class Part {
  using E = typename TileOf<T>::Type;
  static constexpr int kWide = kLanes * kStep<E>;  // elements of a vector

 public:
  Part(Arena& arena, const AttentionDecode& a)
      : a_(a),
        dim_(round_up(most(a.dim, 1), kWide)),
        dim_v_(round_up(a.dim_v, kLanes)),
        group_(a.group()),
        rows_(group_ * a.len_q),
        q_(arena.array<E>(rows_ * dim_)),
        scores_(arena.array<float>(rows_ * kPart)),
        keys_(arena.array<E>(kTile * dim_)),
        values_(arena.array<float>(kTile * dim_v_)),
        total_(arena.array<float>(dim_v_)),
        result_(arena.array<float>(rows_ * stride())) {}

  // Attends to the keys [first, last); result[row]: dim_v_ values, the highest score, and the sum.
  void attend(int64_t s, int64_t kv_head, int64_t seen, int64_t first, int64_t last, float* result) {
    for (int64_t row = 0; row < rows_; ++row) {
      const T* q = static_cast<const T*>(a_.q.data) + s * a_.q.batch + row / group_ * a_.q.token +
                   (kv_head * group_ + row % group_) * a_.q.head;
      copy_rows(q, 0, 1, a_.dim, q_ + row * dim_, 1, dim_);
    }
    for (int64_t key = first; key < last; key += kTile) {
      const int64_t keys = least(kTile, last - key);
      const T* k = at(a_.k, s, kv_head, key);
      if (last - key > kTile) prefetch(at(a_.k, s, kv_head, key + kTile), a_.k.token, a_.dim);
      float* const scores = scores_ + key - first;
      if constexpr (sizeof(T) == sizeof(E)) {  // the same type
        if (keys == kTile && dim_ == a_.dim) {
          score(reinterpret_cast<const E*>(k), a_.k.token, scores);
          continue;
        }
      }
      copy_rows(k, a_.k.token, keys, a_.dim, keys_, kTile, dim_);
      score(keys_, dim_, scores);
    }
    for (int64_t row = 0; row < rows_; ++row) {
      weigh(row, seen, first, last, result + row * stride() + dim_v_);
      std::memset(result + row * stride(), 0, dim_v_ * sizeof(float));
    }
    for (int64_t key = first; key < last; key += kTile) {
      const int64_t keys = least(kTile, last - key);
      const T* v = at(a_.v, s, kv_head, key);
      if (last - key > kTile) prefetch(at(a_.v, s, kv_head, key + kTile), a_.v.token, a_.dim_v);
      const float* p = scores_ + key - first;
      if (dim_v_ == a_.dim_v) {
        add_visible(p, v, a_.v.token, key, keys, seen, result);
      } else {
        copy_rows(v, a_.v.token, keys, a_.dim_v, values_, keys, dim_v_);
        add_visible(p, values_, dim_v_, key, keys, seen, result);
      }
    }
  }

  // The row's output, of its parts' results, `step` apart.
  void join(int64_t s, int64_t kv_head, int64_t row, const float* results, int64_t parts, int64_t step) {
    const int64_t head = kv_head * group_ + row % group_, query = row / group_;
    float highest = a_.sinks ? a_.sinks[head] : -kInfinity, sum = a_.sinks ? 1.f : 0.f;
    std::memset(total_, 0, dim_v_ * sizeof(float));
    for (int64_t part = 0; part < parts; ++part) {
      const float *values = results + part * step, top_of = values[dim_v_], sum_of = values[dim_v_ + 1];
      if (top_of == -kInfinity && sum_of == 0.f) continue;
      const float top = highest > top_of ? highest : top_of, base = top == -kInfinity ? 0.f : top;
      const vfloat both = exp_nonpositive(first_lanes(broadcast(highest - base), 1, top_of - base));
      const vfloat before = broadcast(both[0]), now = broadcast(both[1]);
      const auto joined = [&](vfloat a, vfloat b) { return settled(a * before) + b * now; };
      sum = joined(broadcast(sum), broadcast(sum_of))[0];
      for (int64_t d = 0; d < dim_v_; d += kLanes) store(total_ + d, joined(load(total_ + d), load(values + d)));
      highest = top;
    }
    T* out = static_cast<T*>(a_.out) + ((s * a_.len_q + query) * a_.heads + head) * a_.dim_v;
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
    for (int64_t d = 0; d < a_.dim_v; d += kLanes) {
      const vfloat v = load(total_ + d) * inverse;
      a_.dim_v - d >= kLanes ? store(out + d, v) : store_partial(out + d, v, a_.dim_v - d);
    }
    if (a_.lse) a_.lse[(s * a_.heads + head) * a_.len_q + query] = highest + __builtin_logf(sum);
  }

  int64_t rows() const { return rows_; }
  // From one row's result to the next.
  int64_t stride() const { return dim_v_ + kLanes; }
  // Of a part that is alone.
  float* result() const { return result_; }

 private:
  // Where a tile of keys or values begins.
  const T* at(const Heads& x, int64_t s, int64_t kv_head, int64_t key) const {
    const T* const pool = static_cast<const T*>(x.data) + kv_head * x.head;
    if (!a_.table) return pool + s * x.batch + key * x.token;
    const int64_t page = key >> a_.page_shift, within = key - (page << a_.page_shift);
    return pool + a_.table[s * a_.columns + page] * x.batch + within * x.token;
  }

  // The next tile: pages lie apart, and heads between the keys of one, where the processor itself fetches too little.
  static void prefetch(const T* x, int64_t step, int64_t dim) {
    for (int i = 0; i < kTile; ++i)
      for (int64_t d = 0; d < dim; d += kCacheLine / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + i * step + d);
  }

  // The keys that a row sees of those that hold something.
  Range range(int64_t row, int64_t seen) const {
    const int64_t position = seen - a_.len_q + row / group_;
    return {most(0, position - a_.left), clamp(position + a_.right + 1, 0, seen)};
  }

  // A tile's scores, of every row.
  void score(const E* keys, int64_t step, float* scores) const {
    for (int64_t row = 0; row < rows_; ++row) {
      const E* q = q_ + row * dim_;
      const E* k[(kTile + 2) / 3];  // a pointer for three keys: x86 addresses them as p, p + step, p + 2 step
#pragma GCC unroll 6
      for (int g = 0; g < (kTile + 2) / 3; ++g) k[g] = keys + 3 * g * step;
      vfloat dots[kTile];
      const vuint32 first = load_bits<vuint32>(q);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i)
        dots[i] = add_products<E>(vfloat{}, first, load_bits<vuint32>(k[i / 3] + i % 3 * step));
      for (int64_t d = kWide; d < dim_; d += kWide) {
        const vuint32 next = load_bits<vuint32>(q + d);
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i) {
          if (i % 3 == 0) k[i / 3] += kWide;
          dots[i] = add_products<E>(dots[i], next, load_bits<vuint32>(k[i / 3] + i % 3 * step));
        }
      }
      store(scores + row * kPart, sums(dots));
    }
  }

  // Scores become probabilities; those outside the range 0.
  void weigh(int64_t row, int64_t seen, int64_t first, int64_t last, float* top_and_sum) {
    const Range visible = range(row, seen);
    float* scores = scores_ + row * kPart;
    vfloat top = broadcast(-kInfinity);
    for (int64_t key = first; key < last; key += kLanes) {
      vfloat x = load(scores + key - first);
      x = a_.softcap ? tanh(x * (a_.scale / a_.softcap)) * a_.softcap : x * (a_.scale);
      x = lanes_from_to(x, visible.begin - key, visible.end - key, -kInfinity);
      store(scores + key - first, x);
      top = maximum(top, x);
    }
    const float highest = greatest(top), base = highest == -kInfinity ? 0.f : highest;
    vfloat sum{};
    for (int64_t key = first; key < last; key += kLanes) {
      const vfloat p = exp_nonpositive(load(scores + key - first) - base);
      store(scores + key - first, p);
      sum += p;
    }
    top_and_sum[0] = highest;
    top_and_sum[1] = FASTLLM_ISA::sum(sum);
  }

  // Adds a tile's values to each row that sees them: to all at once, or query by query where those see others.
  template <typename X>
  void add_visible(const float* p, const X* v, int64_t step, int64_t key, int64_t keys, int64_t seen, float* out) const {
    const Range begin = range(0, seen), end = range(rows_ - 1, seen);
    const bool together = a_.len_q == 1 || (end.begin <= key && begin.end >= key + keys);
    const int64_t rows = together ? rows_ : group_;
    for (int64_t row = 0; row < rows_; row += rows) {
      const Range visible = range(row, seen);
      add_values(rows, p + row * kPart, v, step, most(0, visible.begin - key), least(keys, visible.end - key),
                 out + row * stride(), stride(), dim_v_);
    }
  }

  const AttentionDecode& a_;
  int64_t dim_, dim_v_, group_, rows_;
  E* const q_;
  float* const scores_;
  E* const keys_;
  float *const values_, *const total_, *const result_;
};

// The parts of all sequences, counted through: those in which a query sees something.
class Parts {
 public:
  explicit Parts(const AttentionDecode& a) : sequences_(a.sequences), first_(sequences_ + 1) {
    first_[0] = 0;
    for (int64_t s = 0; s < sequences_; ++s)
      first_[s + 1] = first_[s] + most(0, blocks_of(a.seen_of(s), kPart) - a.first_of(s) / kPart);
  }
  int64_t count() const { return first_[sequences_]; }
  int64_t first(int64_t s) const { return first_[s]; }
  int64_t of(int64_t s) const { return first_[s + 1] - first_[s]; }
  int64_t sequence(int64_t part) const {
    int64_t low = 0, high = sequences_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] <= part ? low : high) = middle;
    }
    return low;
  }

 private:
  int64_t sequences_;
  Buffer<int64_t> first_;
};

template <typename T>
void decode(const AttentionDecode& a) {
  const int64_t rows = a.group() * a.len_q, stride = round_up(a.dim_v, kLanes) + kLanes;
  if (a.sequences * a.kv_heads * rows == 0) return;
  const Parts parts(a);
  int64_t apart = 0;  // parts that are not alone, whose results wait for the others
  for (int64_t s = 0; s < a.sequences; ++s) apart += parts.of(s) > 1 ? parts.of(s) : 0;
  const Buffer<float> results(apart ? parts.count() * a.kv_heads * rows * stride : 0);
  const PerThread<Part<T>> memory(a);

#pragma omp parallel if (parts.count() * kPart * a.kv_heads * rows * most(a.dim, a.dim_v) > kParallelProducts)
  {
    Arena arena = memory.mine();
    Part<T> part(arena, a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < parts.count() * a.kv_heads; ++item) {
      const int64_t index = item / a.kv_heads, kv_head = item % a.kv_heads;
      const int64_t s = parts.sequence(index), seen = a.seen_of(s), start = a.first_of(s);
      const int64_t first = (start / kPart + index - parts.first(s)) * kPart;
      const bool alone = parts.of(s) == 1;
      float* const result = alone ? part.result() : results + item * rows * stride;
      part.attend(s, kv_head, seen, most(first, start / kTile * kTile), least(first + kPart, seen), result);
      for (int64_t row = 0; alone && row < rows; ++row) part.join(s, kv_head, row, result + row * stride, 1, 0);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.sequences * a.kv_heads * rows; ++i) {
      const int64_t s = i / (a.kv_heads * rows), kv_head = i / rows % a.kv_heads, row = i % rows;
      if (parts.of(s) == 1) continue;
      const float* result = results + ((parts.first(s) * a.kv_heads + kv_head) * rows + row) * stride;
      part.join(s, kv_head, row, result, parts.of(s), a.kv_heads * rows * stride);
    }
  }
}

}  // namespace

void attention_decode(const AttentionDecode& a) {
  with_type(a.dtype, [&](auto tag) { decode<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
