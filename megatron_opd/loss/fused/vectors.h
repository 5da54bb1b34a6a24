// Vectors as wide as the machine's registers, in the notation that GCC and Clang share: one operation works on LANES
// values. Written out, and not left to the compiler's vectoriser, because a loop over vectors can ask for memory that is
// wanted later at an even pace, which a loop over values cannot without losing its vectors.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

constexpr float NOTHING = -1e30f;  // maximum of no columns; finite, so that differences are
constexpr float TINY = 1.17549435e-38f;

inline Vec all(float x) { return Vec{} + x; }

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

inline Vec load_bf16(const void* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return (Vec)(__builtin_convertvector(x, Bits) << 16);
}

inline void store_bf16(void* to, Vec x) {  // to nearest, ties to even
  const Bits bits = (Bits)x, quiet_nan = Bits{} + 0x7fc0u;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Halves half = __builtin_convertvector(x != x ? quiet_nan : rounded, Halves);
  std::memcpy(to, &half, sizeof half);
}

typedef double Wide __attribute__((vector_size(LANES * 8)));

inline Wide wide(Vec x) { return __builtin_convertvector(x, Wide); }

// The larger of each pair; a NaN of x is passed over.
inline Vec larger(Vec x, Vec than) { return x > than ? x : than; }
inline Vec smaller(Vec x, Vec than) { return x < than ? x : than; }

template <typename T, int N>
struct Part {
  typedef T Vector __attribute__((vector_size(N * sizeof(T))));
};

// One value of all N, by folding the vector.
template <typename T, int N, typename Fold>
inline T folded(const typename Part<T, N>::Vector& x, Fold fold) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    typename Part<T, N / 2>::Vector low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, (const char*)&x + sizeof low, sizeof high);
    return folded<T, N / 2>(fold(low, high), fold);
  }
}

// These are not inlined: who adds up would keep its vector in memory.
__attribute__((noinline)) float sum(Vec x) {
  return folded<float, LANES>(x, [](auto low, auto high) { return low + high; });
}

__attribute__((noinline)) float largest(Vec x) {
  return folded<float, LANES>(x, [](auto low, auto high) { return low > high ? low : high; });
}

inline double sum(const Wide& x) {
  return folded<double, LANES>(x, [](auto low, auto high) { return low + high; });
}

// Whether any lane of a comparison's result is true.
inline bool any(Ints x) {
  return folded<int32_t, LANES>(x, [](auto low, auto high) { return low | high; });
}

// exp for x <= 0 or a little above; 0 below -87; NaN stays NaN. Within 1 ulp and 1.3e-8 of |x|, by which fp32 misses
// log2(e): less than what the subtraction that made x has cost, and the same for a row's every column.
inline __attribute__((always_inline)) Vec fast_exp(Vec x) {
  const float log2e = 1.44269504f, rounder = 12582912.f + 127;  // to the nearest integer, in the low bits, plus fp32's bias
  const Vec shifted = x * log2e + rounder;
  const Vec r = x * log2e - (shifted - rounder), r2 = r * r;
  const Vec p0 = r * 6.9314718e-1f + 1.f;
  const Vec p2 = r * 5.5503320e-2f + 2.4022648e-1f;
  const Vec p4 = r * 1.3399004e-3f + 9.6184388e-3f;
  const Vec y = (((r2 * 1.5353257e-4f + p4) * r2 + p2) * r2 + p0) * (Vec)((Bits)shifted << 23);
  return x < -87.f ? Vec{} : y;
}

// log, 1 ulp; that of the smallest normal number for anything below it. The polynomial by pairs of its terms: fewer
// operations wait for one another than in Horner's form.
inline __attribute__((always_inline)) Vec fast_log(Vec x) {
  x = TINY > x ? all(TINY) : x;  // a NaN stays
  const Bits bits = (Bits)x - 0x3f3504f3u;  // mantissas from sqrt(1/2) to sqrt(2)
  const Vec e = __builtin_convertvector((Ints)bits >> 23, Vec);
  const Vec m = (Vec)((bits & 0x007fffffu) + 0x3f3504f3u) - 1.f, m2 = m * m, m4 = m2 * m2;
  const Vec p0 = m * -2.4999993993e-1f + 3.3333331174e-1f;
  const Vec p2 = m * -1.6668057665e-1f + 2.0000714765e-1f;
  const Vec p4 = m * -1.2420140846e-1f + 1.4249322787e-1f;
  const Vec p6 = m * -1.1514610310e-1f + 1.1676998740e-1f;
  const Vec p = (m4 * 7.0376836292e-2f + (p6 * m2 + p4)) * m4 + (p2 * m2 + p0);
  return e * 0.693147181f + ((p * m - 0.5f) * m2 + m);
}

}  // namespace
