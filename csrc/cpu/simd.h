// Vectors of float32, and float16 and bfloat16 loaded into and stored from them.
//
// Each source in this folder is compiled once per instruction set (FASTLLM_ISA, set by setup.py) and
// everything here lives in that set's namespace, so that no function compiled for a newer processor is
// ever linked into code that runs on an older one. For the same reason these sources instantiate nothing
// of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../tensor.h"

#ifndef FASTLLM_ISA
#define FASTLLM_ISA base
#endif

namespace fastllm::cpu::FASTLLM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vuint16 __attribute__((vector_size(2 * kLanes)));

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// Aliasing-safe unaligned access; compiles to one move.
template <typename V>
inline V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
inline void store_bits(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline vfloat broadcast(float x) { return x - vfloat{}; }

inline vfloat load(const float* p) { return load_bits<vfloat>(p); }
inline void store(float* p, vfloat v) { store_bits(p, v); }

// __builtin_convertvector would do, but GCC 12 takes it apart into halves.
#if defined(__AVX512F__)
inline vuint32 widen(vuint16 v) { return (vuint32)_mm512_cvtepu16_epi32((__m256i)v); }
inline vuint16 narrow(vuint32 v) { return (vuint16)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
inline vuint32 widen(vuint16 v) { return (vuint32)_mm256_cvtepu16_epi32((__m128i)v); }
inline vuint16 narrow(vuint32 v) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // within each half
  return (vuint16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}
#else
inline vuint32 widen(vuint16 v) { return __builtin_convertvector(v, vuint32); }
inline vuint16 narrow(vuint32 v) { return __builtin_convertvector(v, vuint16); }
#endif

inline vfloat load(const bfloat16* p) { return (vfloat)(widen(load_bits<vuint16>(p)) << 16); }

#if defined(__AVX512BF16__)  // one instruction instead of eight; what is below 1.2e-38 becomes 0
inline void store(bfloat16* p, vfloat v) { store_bits(p, _mm512_cvtneps_pbh((__m512)v)); }
#else
inline void store(bfloat16* p, vfloat v) {
  const vuint32 u = (vuint32)v;
  const vuint32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const vuint32 quiet = (u >> 16) | 0x40u;                          // a NaN must not round to infinity
  store_bits(p, narrow(v == v ? rounded : quiet));
}
#endif

#if defined(__AVX512F__)
inline vfloat load(const float16* p) { return (vfloat)_mm512_cvtph_ps(load_bits<__m256i>(p)); }
inline void store(float16* p, vfloat v) {
  store_bits(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline vfloat load(const float16* p) { return (vfloat)_mm256_cvtph_ps(load_bits<__m128i>(p)); }
inline void store(float16* p, vfloat v) { store_bits(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
// Branch-free integer forms, after the binary16 layout: 1 sign, 5 exponent (bias 15), 10 fraction bits.
inline vfloat load(const float16* p) {
  const vuint32 h = widen(load_bits<vuint16>(p));
  const vuint32 sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent to float32's bias and normalises subnormals on the way.
  const vfloat scaled = (vfloat)magnitude * broadcast(0x1p112f);
  const vuint32 none{}, infinite = none + 0x7f800000u;
  const vuint32 special = magnitude >= 0x0f800000u ? infinite : none;  // infinity and NaN
  return (vfloat)((vuint32)scaled | special | sign);
}
inline void store(float16* p, vfloat v) {
  const vuint32 u = (vuint32)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const vuint32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 leaves a subnormal's bits, rounded to nearest even, at the bottom of the fraction.
  const vuint32 subnormal = (vuint32)((vfloat)magnitude + broadcast(0.5f)) - 0x3f000000u;
  const vuint32 none{}, infinite = none + 0x7c00u, nan = none + 0x7e00u;
  vuint32 out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x477ff000u ? infinite : out;
  out = magnitude > 0x7f800000u ? nan : out;
  store_bits(p, narrow(out | sign));
}
#endif

// Bytes as numbers.
inline vfloat load(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bits<__m128i>(p)));
#elif defined(__AVX2__)
  return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

inline vfloat load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(p)));
#elif defined(__AVX2__)
  return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// The first `count` (< kLanes) elements of a row's end; the lanes after them hold 0.
template <typename T>
inline vfloat load_partial(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}
template <typename T>
inline void store_partial(T* p, vfloat v, int64_t count) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// v in the first `count` lanes, `other` in those after.
inline vfloat first_lanes(vfloat v, int64_t count, float other) {
  vuint32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<uint32_t>(count) ? v : broadcast(other);
}

// v in the lanes from `first` to `end`, which is excluded; either may lie outside of the vector.
inline vfloat lanes_from_to(vfloat v, int64_t first, int64_t end, float other) {
  vint32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const int32_t from = first < 0 ? 0 : first > kLanes ? kLanes : static_cast<int32_t>(first);
  const int32_t to = end < 0 ? 0 : end > kLanes ? kLanes : static_cast<int32_t>(end);
  return (lane >= from) & (lane < to) ? v : broadcast(other);
}

template <typename T>
inline vfloat rounded(vfloat v) {
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}
template <>
inline vfloat rounded<float>(vfloat v) {
  return v;
}

// Lane by lane; where a lane of either is NaN it is that of b.
inline vfloat maximum(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Whether a > b in any lane.
inline bool any_greater(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= a[i] > b[i];
  return any;
#endif
}

// v, rounded to float32: keeps the compiler from fusing the product that v is into a sum, where another place
// rounds it and the two must agree.
inline vfloat settled(vfloat v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// e^x to about one unit in the last place: 2^n * p(r) with x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial
// of degree 6 that minimises the relative error there. Above 88.7 it is infinity; below -87.3 it is 0, or
// with AVX-512 subnormal and 0 from -104 on.
inline vfloat expm1_polynomial(vfloat r) {
  vfloat p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r;
}
inline vfloat exp_polynomial(vfloat r) { return expm1_polynomial(r) + 1.f; }

inline vfloat exp(vfloat x) {
#if defined(__AVX512F__)
  // Beyond these the result is 0 and infinity; infinities would make r NaN. A NaN stays: it is second.
  x = maximum(broadcast(-105.f), (vfloat)_mm512_min_ps((__m512)broadcast(90.f), (__m512)x));
  const __m512 t = (__m512)(x * 1.44269504f);
  const vfloat n = (vfloat)_mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  return (vfloat)_mm512_scalef_ps((__m512)exp_polynomial(r), (__m512)n);
#else
  const vfloat shifter = broadcast(0x1.8p23f);  // adding it rounds to a whole number, in the lowest bits
  const vfloat t = x * 1.44269504f + shifter, n = t - shifter;
  const vfloat p = exp_polynomial(x - n * 0.693359375f + n * 2.12194440e-4f);
  const vfloat scaled = (vfloat)((vuint32)p + ((vuint32)t << 23));
  const vfloat none{};
  const vfloat finite = x < -87.33f ? none : scaled;
  // 88.37 and not 88.72: beyond it n is 128, for which there is no exponent, so multiply in two steps
  const vfloat large = (vfloat)((vuint32)p + (((vuint32)t - 1u) << 23)) * 2.f;
  return x > 88.37f ? (x > 88.7228f ? none + __builtin_inff() : large) : finite;
#endif
}

inline vfloat sigmoid(vfloat x) { return 1.f / (1.f + exp(-x)); }

// e^x for x <= 0 in fewer steps than exp: to 1.3 units in the last place near 0, and to |x| units of it further away,
// where e^x is small beside a sum that has 1 in it. -inf gives 0, and so does what lies below -87.3 (with AVX-512:
// below -104).
inline vfloat exp_nonpositive(vfloat x) {
#if defined(__AVX512F__)
  const vfloat t = x * 1.44269504f;
  const vfloat r = (vfloat)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
  vfloat p = broadcast(2.1612916316e-4f);  // 2^r with minimal relative error on [0, 1], exact at 0
  p = p * r + 1.2467845809e-3f;
  p = p * r + 9.6754515544e-3f;
  p = p * r + 5.5485282093e-2f;
  p = p * r + 2.4022930861e-1f;
  p = p * r + 6.9314706326e-1f;
  p = p * r + 1.f;
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)t);  // 2^floor(t) times
#else
  const vfloat shifter = broadcast(0x1.8p23f);
  const vfloat t = x * 1.44269504f + shifter, n = t - shifter;
  const vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  vfloat p = broadcast(1.3843465845e-3f);  // minimal relative error on [-ln 2 / 2, ln 2 / 2], exact at 0
  p = p * r + 8.3743167584e-3f;
  p = p * r + 4.1668012831e-2f;
  p = p * r + 1.6666429408e-1f;
  p = p * r + 4.9999994139e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return x < -87.33f ? vfloat{} : (vfloat)((vuint32)p + ((vuint32)t << 23));
#endif
}

// tanh x to about one unit in the last place: an odd polynomial (Cephes) near 0, where 1 - 2 / (e^2x + 1)
// would cancel.
inline vfloat tanh(vfloat x) {
  const vfloat z = x * x;
  vfloat p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vfloat far = 1.f - 2.f / (exp(x + x) + 1.f);
  return z < 0.390625f ? p * z * x + x : far;
}

// In pairs: four roundings, not fifteen.
inline float sum(vfloat v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float greatest(vfloat v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// Lanes 2i and 2i + 1 change places.
inline vfloat swap_neighbours(vfloat v) {
#if defined(__clang__)
  vfloat out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[i ^ 1];
  return out;
#else
  vuint32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i ^ 1;
  return __builtin_shuffle(v, lane);
#endif
}

// Lanes of a and b in turn: the first halves of both, or the second.
inline vuint32 interleave(vuint32 a, vuint32 b, bool second) {
  vuint32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i / 2 + i % 2 * kLanes + second * (kLanes / 2);
#if defined(__clang__)
  vuint32 out;
  for (int i = 0; i < kLanes; ++i) out[i] = lane[i] < kLanes ? a[lane[i]] : b[lane[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, lane);
#endif
}

// Rows become columns: log2(kLanes) times, each pair of rows half the matrix apart is interleaved.
inline void transpose(vuint32 (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    vuint32 out[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      out[2 * i] = interleave(rows[i], rows[i + kLanes / 2], false);
      out[2 * i + 1] = interleave(rows[i], rows[i + kLanes / 2], true);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = out[i];
  }
}

// Calls f(T{}) with the element type that `dtype` stands for.
template <typename F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float16: return f(float16{});
    case DType::bfloat16: return f(bfloat16{});
  }
}

template <typename T>
inline const T* row(const Rows& rows, int64_t r) {
  return static_cast<const T*>(rows.data) + (r / rows.inner) * rows.outer_stride + (r % rows.inner) * rows.inner_stride;
}

}  // namespace fastllm::cpu::FASTLLM_ISA
