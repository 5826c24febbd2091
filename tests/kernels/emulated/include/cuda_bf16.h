// Stand-in for <cuda_bf16.h>.
#pragma once
#include <cstdint>
#include <cstring>
struct __nv_bfloat16 {
  uint16_t x;
};
inline float __bfloat162float(__nv_bfloat16 number) {
  const uint32_t bits = static_cast<uint32_t>(number.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
// To the nearest even number; NaN has one pattern.
inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  if (number != number) return {0x7FFF};
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
