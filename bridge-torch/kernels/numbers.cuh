// Number formats and 16-byte accesses. Kernels compute in float; memory holds bfloat16 or float.
#pragma once

#include "cuda_types.hpp"
#include "device.cuh"

namespace bridge {

// The bits of a bfloat16. A type of our own, so that the emulation needs no header of CUDA's.
struct Bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(Bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(float x) { return x; }

// Two floats to two bfloat16, nearest even; `low` goes to the lower address.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#if !defined(BRIDGE_EMULATION)
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const auto round = [](float x) -> unsigned {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
      return 0x7FFFu;
    }
    return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  };
  return round(low) | round(high) << 16;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  return Bf16{static_cast<uint16_t>(pack_bf16(x, 0.0f) & 0xFFFFu)};
}

// `x` as T would store it.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// How many T fit into one 16-byte access.
template <class T>
inline constexpr int kVec = static_cast<int>(16 / sizeof(T));

struct alignas(16) Bits128 {
  unsigned word[4];
};

template <class Pointer>
__device__ __forceinline__ void check_aligned(Pointer pointer) {
#if defined(BRIDGE_EMULATION)
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
    ::emulation::fail("a 16-byte access at %p", static_cast<const void*>(pointer));
  }
#else
  static_cast<void>(pointer);
#endif
}

__device__ __forceinline__ void unpack(const Bits128& raw, float (&out)[8]) {
  BRIDGE_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(raw.word[i] << 16);
    out[2 * i + 1] = __uint_as_float(raw.word[i] & 0xFFFF0000u);
  }
}
__device__ __forceinline__ void unpack(const Bits128& raw, float (&out)[4]) {
  BRIDGE_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[i] = __uint_as_float(raw.word[i]);
  }
}

template <class T>
__device__ __forceinline__ Bits128 load_bits(const T* from) {
  check_aligned(from);
#if !defined(BRIDGE_EMULATION)
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  return Bits128{{raw.x, raw.y, raw.z, raw.w}};
#else
  return *reinterpret_cast<const Bits128*>(from);
#endif
}

// To global memory. In PTX, because nvcc split assignments of uint4 into four stores of a word where it pleased. Without a
// memory clobber, so that loads behind it can move in front: a kernel must not read through a pointer what it stored here.
template <class T>
__device__ __forceinline__ void store_bits(T* to, const Bits128& raw) {
  check_aligned(to);
#if !defined(BRIDGE_EMULATION)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(raw.word[0]),
               "r"(raw.word[1]), "r"(raw.word[2]), "r"(raw.word[3]));
#else
  *reinterpret_cast<Bits128*>(to) = raw;
#endif
}

// Reads kVec<T> elements from a 16-byte aligned address.
template <class T>
__device__ __forceinline__ void load(const T* from, float (&out)[kVec<T>]) {
  unpack(load_bits(from), out);
}

__device__ __forceinline__ void store(Bf16* to, const float (&values)[8]) {
  Bits128 raw;
  BRIDGE_UNROLL
  for (int i = 0; i < 4; ++i) {
    raw.word[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
  }
  store_bits(to, raw);
}
__device__ __forceinline__ void store(float* to, const float (&values)[4]) {
  Bits128 raw;
  BRIDGE_UNROLL
  for (int i = 0; i < 4; ++i) {
    raw.word[i] = __float_as_uint(values[i]);
  }
  store_bits(to, raw);
}

// One element of a small parameter whose format is known at run time only.
__device__ __forceinline__ float load_scalar(const void* from, int64_t index, DType dtype) {
  return dtype == DType::kBf16 ? to_float(static_cast<const Bf16*>(from)[index]) : static_cast<const float*>(from)[index];
}
// kV neighbouring elements of such a parameter; its start and `index` are 16-byte aligned.
template <int kV>
__device__ __forceinline__ void load_parameter(const void* from, int64_t index, DType dtype, float (&out)[kV]) {
  if (dtype == DType::kF32) {
    BRIDGE_UNROLL
    for (int i = 0; i < kV; i += 4) {
      float piece[4];
      load(static_cast<const float*>(from) + index + i, piece);
      BRIDGE_UNROLL
      for (int j = 0; j < 4; ++j) {
        out[i + j] = piece[j];
      }
    }
  } else if constexpr (kV == 8) {
    load(static_cast<const Bf16*>(from) + index, out);
  } else {
    BRIDGE_UNROLL
    for (int i = 0; i < kV; ++i) {
      out[i] = load_scalar(from, index + i, dtype);
    }
  }
}
__device__ __forceinline__ void store_scalar(void* to, int64_t index, DType dtype, float value) {
  if (dtype == DType::kBf16) {
    static_cast<Bf16*>(to)[index] = from_float<Bf16>(value);
  } else {
    static_cast<float*>(to)[index] = value;
  }
}

// 1 / (1 + e^-x); 0 and 1 far out, never NaN for a finite or infinite x. The approximate division is off by two units of the
// last place and gives 0 above 2^126; the exact one calls a subroutine, for which compilers spill registers.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// The gradient of silu(gate) up for g, in the place of gate and up.
__device__ __forceinline__ void swiglu_gradient(float& gate, float& up, float g) {
  const float s = sigmoid(gate), d_gate = g * up * s * (1.0f + gate * (1.0f - s));
  up = g * gate * s;
  gate = d_gate;
}

// d silu(x) / dx.
__device__ __forceinline__ float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

}  // namespace bridge
