#include "tensor_cores.h"

#include <cmath>
#include <cstring>

#include "copies.h"

#if defined(__x86_64__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace simt {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

struct Load {
  uint32_t* matrices;
  const void* row;
  const Site* site;
  bool transposed;
};

void load(const Lanes& lanes) {
  const unsigned char* rows[warpSize];
  for (int lane = 0; lane < warpSize; ++lane) {
    const auto& argument = lanes.at<Load>(lane);
    check_row(argument.row, lanes.first + lane, *argument.site);
    rows[lane] = static_cast<const unsigned char*>(argument.row);
  }
  const bool transposed = lanes.at<Load>(0).transposed;
  for (int lane = 0; lane < warpSize; ++lane) {
    uint32_t* to = lanes.at<Load>(lane).matrices;
    const int across = lane / 4, pair = 2 * (lane % 4);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const unsigned char* const* row = rows + 8 * matrix;
      uint16_t first, second;
      std::memcpy(&first, transposed ? row[pair] + 2 * across : row[across] + 2 * pair, 2);
      std::memcpy(&second, transposed ? row[pair + 1] + 2 * across : row[across] + 2 * (pair + 1), 2);
      to[matrix] = first | uint32_t(second) << 16;
    }
  }
}

struct Multiply {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// A warp's operands, in order.
struct Operands {
  float d[16][8];
  uint16_t a[16][16];
  uint16_t b[8][16];  // a row for each column
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <Element kElement>
inline double value_of(uint16_t bits) {
  if constexpr (kElement == Element::bfloat16) {
    return as_float(uint32_t(bits) << 16);
  } else {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
    const uint32_t special = rest >= 0x7c00u << 13 ? 0x7f800000u : 0;  // infinity, NaN
    const float size = as_float(rest) * 0x1p112f;  // the bits as a float's are 2^112 too small, subnormals included
    uint32_t size_bits;
    std::memcpy(&size_bits, &size, sizeof size);
    return as_float(sign | (special ? special | rest : size_bits));
  }
}

// Towards zero; beyond the largest float it is infinity.
inline float truncated(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= ~((uint64_t(1) << 29) - 1);  // what a float has no room for
  double rest;
  std::memcpy(&rest, &bits, sizeof rest);
  float result = float(rest);  // exact where it is not subnormal
  const uint32_t further = std::fabs(rest) < 0x1p-126 && std::fabs(double(result)) > std::fabs(rest);
  uint32_t result_bits;
  std::memcpy(&result_bits, &result, sizeof result);
  return as_float(result_bits - further);
}

template <Element kElement>
inline __attribute__((always_inline)) void multiply_in_order(Operands& o) {
  double a[16][16], b[16][8];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = value_of<kElement>(o.a[i][k]);
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < 8; ++j) b[k][j] = value_of<kElement>(o.b[j][k]);
  for (int i = 0; i < 16; ++i) {
    for (int block = 0; block < 16; block += 8) {
      double sum[8];
      for (int j = 0; j < 8; ++j) sum[j] = o.d[i][j];
      for (int k = block; k < block + 8; ++k)
        for (int j = 0; j < 8; ++j) sum[j] += a[i][k] * b[k][j];
      for (int j = 0; j < 8; ++j) o.d[i][j] = truncated(sum[j]);
    }
  }
}

FOR_EACH_PROCESSOR void multiply_float16(Operands& o) { multiply_in_order<Element::float16>(o); }
FOR_EACH_PROCESSOR void multiply_bfloat16(Operands& o) { multiply_in_order<Element::bfloat16>(o); }

template <void (*kMultiply)(Operands&)>
void multiply(const Lanes& lanes) {
  Operands o;
  for (int lane = 0; lane < warpSize; ++lane) {
    const auto& mine = lanes.at<Multiply>(lane);
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      std::memcpy(&o.d[g + 8 * half][c], mine.d + 2 * half, 8);
      std::memcpy(&o.a[g + 8 * half][c], mine.a + half, 4);
      std::memcpy(&o.a[g + 8 * half][c + 8], mine.a + 2 + half, 4);
      std::memcpy(&o.b[g][c + 8 * half], mine.b + half, 4);
    }
  }
  kMultiply(o);
  for (int lane = 0; lane < warpSize; ++lane) {
    float* d = lanes.at<Multiply>(lane).d;
    const int g = lane / 4, c = 2 * (lane % 4);
    std::memcpy(d, &o.d[g][c], 8);
    std::memcpy(d + 2, &o.d[g + 8][c], 8);
  }
}

}  // namespace

void load_matrices(uint32_t (&matrices)[4], const void* row, bool transposed, const Site& site) {
  Load mine{matrices, row, &site, transposed};
  collective(kWholeWarp, site, &mine, load);
}

void multiply(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Site& site) {
  Multiply mine{d, a, {b0, b1}};
  collective(kWholeWarp, site, &mine,
             element == Element::float16 ? multiply<multiply_float16> : multiply<multiply_bfloat16>);
}

}  // namespace simt
