// Tensor core products, matrix loads from shared memory and asynchronous copies into it (sm_80 and newer).
//
// Each wrapper has two bodies: the PTX instruction, and the emulation of what the PTX manual says it does. The manual's
// fragment layouts, with group = lane / 4 and pair = lane % 4:
//   A 16x16: a[0] rows group, columns 2 pair..; a[1] rows group + 8; a[2] and a[3] the same at columns + 8
//   B 16x8:  b[0] rows 2 pair.., column group; b[1] rows + 8
//   C 16x8:  c[0], c[1] row group, columns 2 pair..; c[2], c[3] row group + 8
#pragma once

#include "numbers.cuh"

namespace bridge {

#if defined(BRIDGE_EMULATION)
namespace emulated {

struct Operands {
  unsigned a[4], b[2];
};

inline const Operands& of_lane(const ::emulation::Exchange& all, int lane) {
  return *reinterpret_cast<const Operands*>(all.lanes[lane]);
}

inline float half_of(unsigned word, int upper) {
  return __uint_as_float(upper != 0 ? word & 0xFFFF0000u : word << 16);
}

inline float as_tf32(unsigned word) { return __uint_as_float(word & 0xFFFFE000u); }

}  // namespace emulated
#endif

// c += a b, bfloat16 operands, float32 sums.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if !defined(BRIDGE_EMULATION)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  using emulated::half_of;
  using emulated::Operands;
  const auto all = emulation::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, __FILE__, __LINE__);
  const int group = all.lane / 4, pair = all.lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group, column = 2 * pair + i % 2, lower = i / 2;
    for (int k = 0; k < 16; ++k) {
      const int word = k / 8, within = k % 8;
      const Operands& left = emulated::of_lane(all, row * 4 + within / 2);
      const Operands& right = emulated::of_lane(all, column * 4 + within / 2);
      c[i] += half_of(left.a[2 * word + lower], within % 2) * half_of(right.b[word], within % 2);
    }
  }
#endif
}

// c += a b for a 16x8x8 tile in tf32. A: a[0] row group, column pair; a[1] row + 8; a[2], a[3] the same at column + 4.
// B: b[0] row pair, column group; b[1] row + 4.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if !defined(BRIDGE_EMULATION)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  using emulated::as_tf32;
  using emulated::Operands;
  const auto all = emulation::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, __FILE__, __LINE__);
  const int group = all.lane / 4, pair = all.lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * pair + i % 2, lower = i / 2;
    for (int k = 0; k < 8; ++k) {
      const Operands& left = emulated::of_lane(all, group * 4 + k % 4);
      const Operands& right = emulated::of_lane(all, column * 4 + k % 4);
      c[i] += as_tf32(left.a[2 * (k / 4) + lower]) * as_tf32(right.b[k / 4]);
    }
  }
#endif
}

// The nearest tf32 (10 bits of mantissa), ties away from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
#if !defined(BRIDGE_EMULATION)
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return (__float_as_uint(x) + 0x1000u) & 0xFFFFE000u;
#endif
}

// Four 8x8 matrices of 16-bit numbers. Lane i gives the address of row i % 8 of matrix i / 8; word m of lane i is row i / 4,
// columns 2 (i % 4).. of matrix m. Transposed: rows 2 (i % 4).. of column i / 4.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const Bf16* row) {
  check_aligned(row);
#if !defined(BRIDGE_EMULATION)
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
#else
  // The rows are read before the exchange: a lane that runs ahead may write over them.
  struct Row {
    uint16_t columns[8];
  };
  Row mine;
  for (int i = 0; i < 8; ++i) {
    mine.columns[i] = row[i].bits;
  }
  const auto all = emulation::exchange(mine, __FILE__, __LINE__);
  for (int m = 0; m < 4; ++m) {
    const int major = all.lane / 4, minor = 2 * (all.lane % 4);
    unsigned low, high;
    if (kTransposed) {
      low = emulation::taken<Row>(all, m * 8 + minor).columns[major];
      high = emulation::taken<Row>(all, m * 8 + minor + 1).columns[major];
    } else {
      const auto source = emulation::taken<Row>(all, m * 8 + major);
      low = source.columns[minor];
      high = source.columns[minor + 1];
    }
    words[m] = low | high << 16;
  }
#endif
}

// Starts a copy of 16 bytes to shared memory; zeros without `valid`, and `from` is then not read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  check_aligned(to);
  check_aligned(from);
#if !defined(BRIDGE_EMULATION)
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#else
  auto& thread = *emulation::grid().current;
  const emulation::PendingCopy copy{to, from, size_t{valid ? 16u : 0u}, 16, thread.copy_group};
  if (emulation::copies_arrive_early()) {
    emulation::arrive(copy);
  } else {
    thread.copies.push_back(copy);
  }
#endif
}

// The same for 4 bytes.
__device__ __forceinline__ void copy_async_word(float* to, const float* from, bool valid) {
#if !defined(BRIDGE_EMULATION)
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#else
  auto& thread = *emulation::grid().current;
  const emulation::PendingCopy copy{to, from, size_t{valid ? 4u : 0u}, 4, thread.copy_group};
  if (emulation::copies_arrive_early()) {
    emulation::arrive(copy);
  } else {
    thread.copies.push_back(copy);
  }
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
#if !defined(BRIDGE_EMULATION)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ++emulation::grid().current->copy_group;
#endif
}

// Waits until at most kPending groups of this thread are under way. Other threads' copies need a barrier behind it.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#if !defined(BRIDGE_EMULATION)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  auto& thread = *emulation::grid().current;
  auto& copies = thread.copies;
  const int last = thread.copy_group - kPending;
  size_t kept = 0;
  for (const auto& copy : copies) {
    if (copy.group < last) {
      emulation::arrive(copy);
    } else {
      copies[kept++] = copy;
    }
  }
  copies.resize(kept);
#endif
}

}  // namespace bridge
