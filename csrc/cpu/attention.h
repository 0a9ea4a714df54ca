// What the attention kernels for CPUs share: sequences, blocks, and tiles copied into the layouts of matmul.h.
//
// Scores are kept transposed, keys down and queries across: a vector holds one key and kLanes queries, so the softmax
// needs no sum across lanes, and what it leaves is again an operand of the next product.
#pragma once

#include "../attention.h"

#include "kernels.h"
#include "matmul.h"
#include "workspace.h"

namespace fastllm::cpu::FASTLLM_ISA {

constexpr int kKeys = 192;  // of a block
static_assert(kKeys % kPanel == 0, "blocks are whole panels and tiles");
constexpr float kInfinity = __builtin_inff();

inline int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return least(most(x, low), high); }
// The columns of a tile that holds heads of `dim`: matmul's unit, and never none, of which no product would be written.
inline int64_t padded(int64_t dim) { return round_up(most(dim, 1), kPanel); }

// One of the batch, or one document.
struct Sequence {
  int64_t index, len_q, len_k;
  int64_t first_q, first_k;  // tokens before it: rows of out, of dk and dv

  Sequence(const Attention& a, int64_t s)
      : index(s),
        len_q(a.cu_q ? a.cu_q[s + 1] - a.cu_q[s] : a.len_q),
        len_k(a.cu_k ? a.cu_k[s + 1] - a.cu_k[s] : a.len_k),
        first_q(a.cu_q ? a.cu_q[s] : s * a.len_q),
        first_k(a.cu_k ? a.cu_k[s] : s * a.len_k) {}

  int64_t offset() const { return len_k - len_q; }  // the position of query 0 among the keys
};

template <typename T>
inline const T* token_of(const Attention& a, const Heads& x, int64_t first, int64_t s, int64_t head) {
  const int64_t start = a.cu_q ? first * x.token : s * x.batch;
  return static_cast<const T*>(x.data) + start + head * x.head;
}

// lse and delta: [batch, heads, len_q], or [heads, tokens].
inline int64_t lse_at(const Attention& a, const Sequence& s, int64_t head) {
  return a.cu_q ? head * a.len_q + s.first_q : (s.index * a.heads + head) * a.len_q;
}

// The keys [begin, end) that some of the queries [first, first + count) see.
struct Range {
  int64_t begin, end;
};
inline Range visible(const Attention& a, const Sequence& s, int64_t first, int64_t count) {
  const int64_t at = first + s.offset();
  return {most(0, at - a.left), clamp(at + count + a.right, 0, s.len_k)};
}

// Which of the queries, across lanes, see a key. `ahead` is how far the key lies ahead of query 0 of the block.
struct Band {
  int64_t left, right;

  explicit Band(const Attention& a) : left(a.left), right(a.right) {}

  // Whether every one of `queries` sees every one of `keys`.
  bool covers(int64_t ahead, int64_t keys, int64_t queries) const {
    return ahead + keys - 1 <= right && queries - 1 - ahead <= left;
  }
  // value where query `lane + i` sees the key, else other.
  vfloat select(int64_t ahead, int64_t lane, vfloat value, float other) const {
    return lanes_from_to(value, ahead - lane - right, ahead - lane + left + 1, other);
  }
};

// ---- copies into tiles: rows of `cols` elements, `stride` apart; what lies beyond is 0 ----

template <typename T>
inline vfloat load_some(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : count > 0 ? load_partial(p, count) : vfloat{};
}

template <typename T>
inline void load_block(const T* x, int64_t stride, int64_t rows, int64_t cols, vuint32 (&block)[kLanes]) {
  if (rows >= kLanes && cols >= kLanes) {
    for (int i = 0; i < kLanes; ++i) block[i] = (vuint32)load(x + i * stride);
  } else {
    for (int i = 0; i < kLanes; ++i) block[i] = (vuint32)(i < rows ? load_some(x + i * stride, cols) : vfloat{});
  }
}

// E [rows_out, cols_out], row-major.
template <typename T, typename E>
inline void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t cols, E* out, int64_t rows_out,
                      int64_t cols_out) {
  for (int64_t r = 0; r < rows_out; ++r, out += cols_out) {
    const int64_t given = r < rows ? cols : 0;
    if constexpr (sizeof(T) == sizeof(E)) {  // the same type
      std::memcpy(out, x + r * stride, given * sizeof(T));
      std::memset(out + given, 0, (cols_out - given) * sizeof(T));
    } else {
      for (int64_t c = 0; c < cols_out; c += kLanes) store(out + c, load_some(x + r * stride + c, given - c));
    }
  }
}

// E [cols_out, kKeys]: transposed, row-major. Both are multiples of kLanes. Returns whether all are finite.
template <typename T, typename E>
inline bool copy_transposed(const T* x, int64_t stride, int64_t rows, int64_t cols, E* out, int64_t rows_out,
                            int64_t cols_out) {
  vfloat nothing{};  // the sum of x - x
  for (int64_t r = 0; r < rows_out; r += kLanes)
    for (int64_t c = 0; c < cols_out; c += kLanes) {
      vuint32 block[kLanes];
      load_block(x + r * stride + c, stride, rows - r, cols - c, block);
      for (const vuint32& row : block) nothing += (vfloat)row - (vfloat)row;
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(out + (c + i) * kKeys + r, (vfloat)block[i]);
    }
  return sum(nothing) == 0.f;
}

inline void store_steps(float* out, vfloat a, vfloat) { store(out, a); }
inline void store_steps(bfloat16* out, vfloat a, vfloat b) {  // two rows of the depth, interleaved
#if defined(__AVX512BF16__)
  const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  store_bits(out, _mm512_permutexvar_epi16(order, both));
#else
  bfloat16 low[kLanes], high[kLanes];
  store(low, a);
  store(high, b);
  for (int i = 0; i < kLanes; ++i) out[2 * i] = low[i], out[2 * i + 1] = high[i];
#endif
}

// B of a product whose depth the rows are: panels of columns.
template <typename T, typename E>
inline void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t cols, E* out, int64_t rows_out,
                      int64_t cols_out) {
  const auto at = [&](int64_t r, int64_t c) {
    return r < rows ? load_some(x + r * stride + c, cols - c) : vfloat{};
  };
  for (int64_t panel = 0; panel < cols_out; panel += kPanel)
    for (int64_t r = 0; r < rows_out; r += kStep<E>)
      for (int64_t c = panel; c < panel + kPanel; c += kLanes, out += kLanes * kStep<E>)
        store_steps(out, at(r, c), kStep<E> == 2 ? at(r + 1, c) : vfloat{});
}

// B of a product whose depth the columns are: panels of rows.
template <typename T, typename E>
inline void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t cols, E* out, int64_t rows_out,
                         int64_t cols_out) {
  for (int64_t panel = 0; panel < rows_out; panel += kPanel, out += kPanel * cols_out)
    for (int64_t r = 0; r < kPanel; r += kLanes)
      for (int64_t c = 0; c < cols_out; c += kLanes) {
        vuint32 block[kLanes];
        load_block(x + (panel + r) * stride + c, stride, rows - panel - r, cols - c, block);
        transpose(block);
        for (int i = 0; i < kLanes; i += kStep<E>)
          store_steps(out + (c + i) * kPanel + r * kStep<E>, (vfloat)block[i], (vfloat)block[i + kStep<E> - 1]);
      }
}

// T [rows, cols] from float32 transposed, [cols, x_stride].
template <typename T>
inline void put_transposed(const float* x, int64_t x_stride, int64_t rows, int64_t cols, T* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < cols; c += kLanes) {
      vuint32 block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = (vuint32)load(x + (c + i) * x_stride + r);
      transpose(block);
      for (int64_t i = 0; i < least(kLanes, rows - r); ++i) {
        T* p = out + (r + i) * stride + c;
        cols - c >= kLanes ? store(p, (vfloat)block[i]) : store_partial(p, (vfloat)block[i], cols - c);
      }
    }
}

// The blocks of queries or of keys of all sequences, counted through.
class Blocks {
 public:
  Blocks(const Attention& a, int64_t Sequence::* length, int64_t size) : sequences_(a.sequences), first_(sequences_ + 1) {
    first_[0] = 0;
    for (int64_t s = 0; s < sequences_; ++s) first_[s + 1] = first_[s] + blocks_of(Sequence(a, s).*length, size);
  }
  int64_t count() const { return first_[sequences_]; }
  int64_t first(int64_t s) const { return first_[s]; }

  struct Place {
    int64_t sequence, head, block;  // block: of the sequence
  };
  // Item i of count() * heads. A sequence's blocks of one head come together, and find its keys in the cache; the
  // last block first: under a causal mask it is the longest, and threads that take items one by one end together.
  Place place(int64_t i, int64_t heads) const {
    int64_t low = 0, high = sequences_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] * heads <= i ? low : high) = middle;
    }
    const int64_t blocks = first_[low + 1] - first_[low], at = i - first_[low] * heads;
    return {low, at / blocks, blocks - 1 - at % blocks};
  }

 private:
  int64_t sequences_;
  Buffer<int64_t> first_;
};

// The key blocks of all sequences and heads, packed into tiles of kKeys × dim, of values kKeys × dim_v, in whatever
// order of their elements.
struct KeyTiles {
  int64_t dim, dim_v, heads;
  Blocks blocks;

  explicit KeyTiles(const Attention& a)
      : dim(padded(a.dim)), dim_v(padded(a.dim_v)), heads(a.kv_heads), blocks(a, &Sequence::len_k, kKeys) {}

  int64_t count() const { return blocks.count() * heads; }
  // Tiles are counted through.
  int64_t tile(int64_t s, int64_t head, int64_t block) const { return (blocks.first(s) + block) * heads + head; }
  int64_t at(int64_t tile) const { return tile * kKeys * dim; }
  int64_t at_v(int64_t tile) const { return tile * kKeys * dim_v; }

  // Calls pack(tile, k, v, rows, filled) for each: there are `rows` keys, to be filled up with 0.
  template <typename T, typename Pack>
  void pack_each(const Attention& a, Pack&& pack) const {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count(); ++i) {
      const auto [sequence, head, block] = blocks.place(i, heads);
      const Sequence s(a, sequence);
      const int64_t first = block * kKeys, rows = least(kKeys, s.len_k - first);
      const T* k = token_of<T>(a, a.k, s.first_k, s.index, head) + first * a.k.token;
      const T* v = token_of<T>(a, a.v, s.first_k, s.index, head) + first * a.v.token;
      pack(tile(sequence, head, block), k, v, rows, round_up(rows, kPanel));
    }
  }
};

}  // namespace fastllm::cpu::FASTLLM_ISA
