// AMX: tiles of 16 rows of 64 bytes, and products of two of them. With FASTLLM_EMULATE_AMX they are spelled out in C++,
// which the tests run on processors without them.
#pragma once

#include "fetch.h"
#include "simd.h"

namespace fastllm::cpu::FASTLLM_ISA {

constexpr int kTileRows = 16, kTileDepth = 32;  // of float32 sums; of the bfloat16 that a tile holds a row

#if !defined(FASTLLM_EMULATE_AMX)

// Tiles must be configured in each thread that uses them, and released, or the operating system saves 8 KiB at every
// switch of threads.
struct Tiles {
  // rows, from 1 to 32: those of A and of the sums.
  explicit Tiles(int rows = 2 * kTileRows) {
    const int upper = rows < kTileRows ? rows : kTileRows, lower = rows > upper ? rows - upper : kTileRows;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = kTileRows;
    config.rows[0] = config.rows[1] = config.rows[4] = upper;
    config.rows[2] = config.rows[3] = config.rows[5] = lower;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// [rows, 32] sums in tiles 0 to 3, of which up to 16 rows take two; rows of A in 4 and 5, columns of B in 6 and 7. rows
// are those that the tiles are configured for. Meanwhile what `ahead` names comes into the L2 cache.
template <bool kLower = true, typename Fetch>
inline void amx_tiles(const bfloat16* a, int64_t lda, const bfloat16* b, int64_t depth, float* c, int64_t ldc,
                      bool accumulate, Fetch ahead) {
  float* lower = c + kTileRows * ldc;
  if (accumulate) {
    _tile_loadd(0, c, 4 * ldc);
    _tile_loadd(1, c + kTileRows, 4 * ldc);
    if (kLower) _tile_loadd(2, lower, 4 * ldc);
    if (kLower) _tile_loadd(3, lower + kTileRows, 4 * ldc);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kLower) _tile_zero(2);
    if (kLower) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileDepth, b += kTileDepth * 2 * kTileRows) {
    ahead.step();
    _tile_loadd(4, a + k, 2 * lda);
    if (kLower) _tile_loadd(5, a + kTileRows * lda + k, 2 * lda);
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kLower) _tile_dpbf16ps(2, 5, 6);
    if (kLower) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * ldc);
  _tile_stored(1, c + kTileRows, 4 * ldc);
  if (kLower) _tile_stored(2, lower, 4 * ldc);
  if (kLower) _tile_stored(3, lower + kTileRows, 4 * ldc);
}
template <typename Fetch = NoFetch>
inline void amx_block(const bfloat16* a, int64_t lda, const bfloat16* b, int64_t depth, float* c, int64_t ldc,
                      bool accumulate, int rows = 2 * kTileRows, Fetch ahead = {}) {
  if (rows > kTileRows) return amx_tiles(a, lda, b, depth, c, ldc, accumulate, ahead);
  amx_tiles<false>(a, lda, b, depth, c, ldc, accumulate, ahead);
}

#else

struct Tiles {
  explicit Tiles(int = 0) {}
  ~Tiles() {}
};

template <typename Fetch = NoFetch>
inline void amx_block(const bfloat16* a, int64_t lda, const bfloat16* b, int64_t depth, float* c, int64_t ldc,
                      bool accumulate, int rows = 2 * kTileRows, Fetch = {}) {
  const auto number = [](bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  };
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < 2 * kTileRows; ++j) {
      float sum = accumulate ? c[i * ldc + j] : 0.f;
      for (int64_t k = 0; k < depth; ++k)
        sum += number(a[i * lda + k]) * number(b[(k / 2) * 4 * kTileRows + 2 * j + k % 2]);
      c[i * ldc + j] = sum;
    }
}

#endif

}  // namespace fastllm::cpu::FASTLLM_ISA
