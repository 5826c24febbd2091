// Stand-in for <cuda_fp16.h>. _Float16 rounds to the nearest even number, as __float2half_rn does.
#pragma once
struct __half {
  _Float16 x;
};
inline float __half2float(__half number) { return static_cast<float>(number.x); }
inline __half __float2half_rn(float number) { return {static_cast<_Float16>(number)}; }
