// Attention of a few queries to many keys, on CPUs. Bound by memory: each key and value is read once, for all
// queries of the heads that share it. Keys are split in parts of a fixed length, so that one sequence occupies all
// threads and the result does not depend on their number; the parts' softmaxes are joined at the end.
#include "attention.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kPart = 512;  // keys that a thread takes at a time
constexpr int kTile = kLanes;  // keys whose scores make a vector

// Sums of kLanes vectors, one in each lane.
inline vfloat sums(vfloat (&rows)[kLanes]) {
  vuint32 columns[kLanes];
  for (int i = 0; i < kLanes; ++i) columns[i] = (vuint32)rows[i];
  transpose(columns);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) columns[i] = (vuint32)((vfloat)columns[i] + (vfloat)columns[i + half]);
  return (vfloat)columns[0];
}

template <typename T>
class Part {
 public:
  Part(Arena& arena, const AttentionDecode& a)
      : a_(a),
        dim_(round_up(a.dim, kLanes)),
        dim_v_(round_up(a.dim_v, kLanes)),
        group_(a.group()),
        rows_(group_ * a.len_q),
        q_(arena.array<float>(rows_ * dim_)),
        scores_(arena.array<float>(rows_ * kPart)),
        tile_(arena.array<float>(kTile * most(dim_, dim_v_))),
        total_(arena.array<float>(dim_v_)) {}

  // Attends to the keys [first, last); result[row]: the highest score, the sum, and dim_v_ values.
  void attend(int64_t s, int64_t kv_head, int64_t seen, int64_t first, int64_t last, float* result) {
    const T* k = static_cast<const T*>(a_.k.data) + s * a_.k.batch + kv_head * a_.k.head;
    const T* v = static_cast<const T*>(a_.v.data) + s * a_.v.batch + kv_head * a_.v.head;
    for (int64_t row = 0; row < rows_; ++row) {
      const T* q = static_cast<const T*>(a_.q.data) + s * a_.q.batch + row / group_ * a_.q.token +
                   (kv_head * group_ + row % group_) * a_.q.head;
      copy_rows(q, 0, 1, a_.dim, q_ + row * dim_, 1, dim_);
    }
    for (int64_t key = first; key < last; key += kTile) {
      copy_rows(k + key * a_.k.token, a_.k.token, least(kTile, last - key), a_.dim, tile_, kTile, dim_);
      for (int64_t row = 0; row < rows_; ++row) {
        vfloat dots[kTile] = {};
        for (int64_t d = 0; d < dim_; d += kLanes) {
          const vfloat q = load(q_ + row * dim_ + d);
#pragma GCC unroll 16
          for (int i = 0; i < kTile; ++i) dots[i] += q * load(tile_ + i * dim_ + d);
        }
        store(scores_ + row * kPart + key - first, sums(dots));
      }
    }
    for (int64_t row = 0; row < rows_; ++row) weigh(row, seen, first, last, result + row * stride());
    for (int64_t row = 0; row < rows_; ++row) std::memset(result + row * stride() + 2, 0, dim_v_ * sizeof(float));
    for (int64_t key = first; key < last; key += kTile) {
      const int64_t keys = least(kTile, last - key);
      copy_rows(v + key * a_.v.token, a_.v.token, keys, a_.dim_v, tile_, keys, dim_v_);
      for (int64_t row = 0; row < rows_; ++row) {
        const float* p = scores_ + row * kPart + key - first;
        float* out = result + row * stride() + 2;
        const Range visible = range(row, seen);
        const int64_t begin = most(0, visible.begin - key), end = least(keys, visible.end - key);
        for (int64_t d = 0; d < dim_v_; d += kLanes) {
          vfloat sum = load(out + d);
          for (int64_t i = begin; i < end; ++i) sum += p[i] * load(tile_ + i * dim_v_ + d);
          store(out + d, sum);
        }
      }
    }
  }

  // From one row's result to the next.
  int64_t stride() const { return dim_v_ + 2; }
  float* total() const { return total_; }

  // The keys that a row sees of those that hold something.
  Range range(int64_t row, int64_t seen) const {
    const int64_t at = seen - a_.len_q + row / group_;
    return {most(0, at - a_.left), clamp(at + a_.right + 1, 0, seen)};
  }

 private:
  // Scores become probabilities; those outside the range 0.
  void weigh(int64_t row, int64_t seen, int64_t first, int64_t last, float* result) {
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
    result[0] = highest;
    result[1] = FASTLLM_ISA::sum(sum);
  }

  const AttentionDecode& a_;
  int64_t dim_, dim_v_, group_, rows_;
  float *const q_, *const scores_, *const tile_, *const total_;
};

template <typename T>
void decode(const AttentionDecode& a) {
  const int64_t parts = most(1, blocks_of(a.len_k, kPart)), units = a.sequences * a.kv_heads;
  const int64_t group = a.group(), rows = group * a.len_q, stride = round_up(a.dim_v, kLanes) + 2;
  if (units * rows == 0) return;
  const Buffer<float> results(units * parts * rows * stride);
  const PerThread<Part<T>> memory(a);
  const auto seen_of = [&](int64_t s) { return a.seen ? least(most(a.seen[s], 0), a.len_k) : a.len_k; };

#pragma omp parallel if (units * a.len_k * rows * most(a.dim, a.dim_v) > (1 << 16))
  {
    Arena arena = memory.mine();
    Part<T> part(arena, a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < units * parts; ++item) {
      const int64_t s = item / parts / a.kv_heads, seen = seen_of(s), first = item % parts * kPart;
      const int64_t begin = most(first, part.range(0, seen).begin / kTile * kTile);
      const int64_t end = least(first + kPart, seen);
      float* result = results + item * rows * stride;
      if (begin < end) {
        part.attend(s, item / parts % a.kv_heads, seen, begin, end, result);
      } else {
        for (int64_t row = 0; row < rows; ++row) result[row * stride] = -kInfinity, result[row * stride + 1] = 0.f;
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < units * rows; ++i) {
      const int64_t unit = i / rows, row = i % rows, s = unit / a.kv_heads, query = row / group;
      const int64_t head = unit % a.kv_heads * group + row % group;
      const float* part_of = results + (unit * parts * rows + row) * stride;
      float highest = a.sinks ? a.sinks[head] : -kInfinity, sum = a.sinks ? 1.f : 0.f;
      float weights[2];
      float* const total = part.total();
      std::memset(total, 0, (stride - 2) * sizeof(float));
      for (int64_t p = 0; p < parts; ++p) {
        const float* result = part_of + p * rows * stride;
        if (result[0] == -kInfinity && result[1] == 0.f) continue;
        const float top = highest > result[0] ? highest : result[0], base = top == -kInfinity ? 0.f : top;
        const vfloat both = exp_nonpositive(first_lanes(broadcast(highest - base), 1, result[0] - base));
        weights[0] = both[0], weights[1] = both[1];
        sum = sum * weights[0] + result[1] * weights[1];
        for (int64_t d = 0; d < stride - 2; d += kLanes)
          store(total + d, load(total + d) * weights[0] + load(result + 2 + d) * weights[1]);
        highest = top;
      }
      T* out = static_cast<T*>(a.out) + ((s * a.len_q + query) * a.heads + head) * a.dim_v;
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      for (int64_t d = 0; d < a.dim_v; d += kLanes) {
        const vfloat v = load(total + d) * inverse;
        a.dim_v - d >= kLanes ? store(out + d, v) : store_partial(out + d, v, a.dim_v - d);
      }
      if (a.lse) a.lse[(s * a.heads + head) * a.len_q + query] = highest + __builtin_logf(sum);
    }
  }
}

}  // namespace

void attention_decode(const AttentionDecode& a) {
  with_type(a.dtype, [&](auto tag) { decode<decltype(tag)>(a); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
