#include "tensor_cores.h"

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

// Eight at once, in the compiler's own vector types.
template <typename T>
using Eight __attribute__((vector_size(8 * sizeof(T)))) = T;
using Eight16 = Eight<uint16_t>;
using Eight32 = Eight<uint32_t>;
using Eight64 = Eight<uint64_t>;
using Floats = Eight<float>;
using Doubles = Eight<double>;

// A warp's operands, in order.
struct Operands {
  Floats d[16];
  Eight16 a[16][2];
  Eight16 b[16];
};

#define INLINE inline __attribute__((always_inline))

template <Element kElement>
INLINE void convert(const Eight16& from, Doubles& to) {
  const Eight32 bits = __builtin_convertvector(from, Eight32);
  if constexpr (kElement == Element::bfloat16) {
    to = __builtin_convertvector((Floats)(bits << 16), Doubles);
  } else {
    const Eight32 size = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    const Eight32 special = (Eight32)(size >= 0x7c00) & (112u << 23);  // infinity, NaN
    const Eight32 normal = (size << 13) + (112u << 23) + special;
    const Eight32 subnormal = (Eight32)(__builtin_convertvector((Eight<int32_t>)size, Floats) * 0x1p-24f);
    const Eight32 small = (Eight32)(size < 0x400);
    to = __builtin_convertvector((Floats)((small & subnormal) | (~small & normal) | sign), Doubles);
  }
}

// Towards zero; beyond the largest float it is infinity.
INLINE void truncate(const Doubles& from, Floats& to) {
  const Eight64 kept = (Eight64)from & ~((uint64_t(1) << 29) - 1);  // what a float has room for
  const Floats nearest = __builtin_convertvector((Doubles)kept, Floats);  // exact where it is not subnormal
  const Eight64 size = kept << 1, converted = (Eight64)__builtin_convertvector(nearest, Doubles) << 1;
  const Eight64 further = (Eight64)(converted > size) & (Eight64)(size < uint64_t(1023 - 126) << 53);
  to = (Floats)((Eight32)nearest + __builtin_convertvector(further, Eight32));  // one less
}

template <Element kElement>
INLINE void multiply_in_order(Operands& o) {
  union {
    Doubles eight[16][2];
    double one[16][16];
  } a;
  Doubles b[16];
  for (int i = 0; i < 16; ++i) {
    convert<kElement>(o.a[i][0], a.eight[i][0]);
    convert<kElement>(o.a[i][1], a.eight[i][1]);
    convert<kElement>(o.b[i], b[i]);
  }
  for (int i = 0; i < 16; ++i) {
    for (int block = 0; block < 16; block += 8) {
      Doubles sum = __builtin_convertvector(o.d[i], Doubles);
      for (int k = block; k < block + 8; ++k) sum += a.one[i][k] * b[k];
      truncate(sum, o.d[i]);
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
    const auto at = [c](auto& row) { return reinterpret_cast<unsigned char*>(&row) + c * sizeof row[0]; };
    for (int half = 0; half < 2; ++half) {
      std::memcpy(at(o.d[g + 8 * half]), mine.d + 2 * half, 8);
      std::memcpy(at(o.a[g + 8 * half][0]), mine.a + half, 4);
      std::memcpy(at(o.a[g + 8 * half][1]), mine.a + 2 + half, 4);
      o.b[c + 8 * half][g] = uint16_t(mine.b[half]);
      o.b[c + 1 + 8 * half][g] = uint16_t(mine.b[half] >> 16);
    }
  }
  kMultiply(o);
  for (int lane = 0; lane < warpSize; ++lane) {
    float* d = lanes.at<Multiply>(lane).d;
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) d[i] = o.d[g + i / 2 * 8][c + i % 2];
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
