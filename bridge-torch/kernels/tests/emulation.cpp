// The emulation itself. Without a further argument: matrix instructions against plain products. With one: a kernel that is
// wrong in the way the argument names, which the emulation must refuse.

#include <cstring>

#include "../mma.cuh"

#include "check.hpp"

using namespace check;
using bridge::launch;

namespace {

constexpr int kPitch = 24;  // Bf16 a row in shared memory: 48 bytes

// out[16, 16] = a[16, 16] b, where b[16, 16] is read row by row with the transposing load or, given as its transpose, without.
template <bool kTransposed>
__global__ void product_kernel(const Bf16* a, const Bf16* b, float* out) {
  BRIDGE_SHARED(Bf16, left, 16 * kPitch);
  BRIDGE_SHARED(Bf16, right, 16 * kPitch);
  const int lane = static_cast<int>(threadIdx.x);
  bridge::copy_async(left + lane / 2 * kPitch + lane % 2 * 8, a + lane * 8, true);
  bridge::copy_async(right + lane / 2 * kPitch + lane % 2 * 8, b + lane * 8, true);
  bridge::copy_commit();
  bridge::copy_wait<0>();
  __syncwarp();
  unsigned fa[4], fb[4];
  const int row = lane % 8, matrix = lane / 8;
  bridge::load_matrices<false>(fa, left + (row + matrix % 2 * 8) * kPitch + matrix / 2 * 8);
  bridge::load_matrices<kTransposed>(fb, kTransposed ? right + (row + matrix % 2 * 8) * kPitch + matrix / 2 * 8
                                                     : right + (row + matrix / 2 * 8) * kPitch + matrix % 2 * 8);
  for (int half = 0; half < 2; ++half) {
    float c[4] = {};
    const unsigned column[2] = {fb[2 * half], fb[2 * half + 1]};
    bridge::mma_bf16(c, fa, column);
    for (int i = 0; i < 4; ++i) {
      out[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = c[i];
    }
  }
}

// out[16, 8] = a[16, 8] b[8, 8] in tf32.
__global__ void tf32_kernel(const float* a, const float* b, float* out) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, pair = lane % 4;
  const unsigned fa[4] = {bridge::to_tf32(a[group * 8 + pair]), bridge::to_tf32(a[(group + 8) * 8 + pair]),
                          bridge::to_tf32(a[group * 8 + pair + 4]), bridge::to_tf32(a[(group + 8) * 8 + pair + 4])};
  const unsigned fb[2] = {bridge::to_tf32(b[pair * 8 + group]), bridge::to_tf32(b[(pair + 4) * 8 + group])};
  float c[4] = {};
  bridge::mma_tf32(c, fa, fb);
  for (int i = 0; i < 4; ++i) {
    out[(group + i / 2 * 8) * 8 + pair * 2 + i % 2] = c[i];
  }
}

void products() {
  Random random(3);
  const Values a = stored<Bf16>(random.normal(256)), b = stored<Bf16>(random.normal(256));
  Values b_transposed(256), expected(256);
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 16; ++j) {
      b_transposed[j * 16 + i] = b[i * 16 + j];
      for (size_t k = 0; k < 16; ++k) {
        expected[i * 16 + j] += a[i * 16 + k] * b[k * 16 + j];
      }
    }
  }
  for (const bool transposed : {true, false}) {
    context() = transposed ? "product through the transposing load" : "product";
    Outputs found = under_every_schedule([&] {
      Buffer<Bf16> left(a), right(transposed ? b : b_transposed);
      Buffer<float> out(256);
      launched(launch(transposed ? product_kernel<true> : product_kernel<false>, dim3(1), dim3(32), 0, nullptr, left.data(),
                      right.data(), out.data()));
      return Outputs{{"out", out.values()}};
    });
    close_norm("out", found["out"], expected, 1e-6);
  }
  context() = "tf32 product";
  const Values wide_a = stored<float>(random.normal(128)), wide_b = stored<float>(random.normal(64));
  Values wide(128);
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      for (size_t k = 0; k < 8; ++k) {
        wide[i * 8 + j] += wide_a[i * 8 + k] * wide_b[k * 8 + j];
      }
    }
  }
  Outputs found = under_every_schedule([&] {
    Buffer<float> left(wide_a), right(wide_b), out(128);
    launched(launch(tf32_kernel, dim3(1), dim3(32), 0, nullptr, left.data(), right.data(), out.data()));
    return Outputs{{"out", out.values()}};
  });
  close_norm("out", found["out"], wide, 1e-3);
  require(close_norm("out", found["out"], wide, 1.0) > 1e-5, "tf32 operands have 10 bits");
}

__global__ void left_early(float* out) {
  if (threadIdx.x == 5) {
    return;
  }
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_places(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void half_a_warp(float* out) {
  float x = 1.0f;
  if (threadIdx.x % 32 < 16) {
    x = __shfl_xor_sync(bridge::kWholeWarp, x, 1);
  }
  out[threadIdx.x] = x;
}

__global__ void shared_overrun(float* out) {
  BRIDGE_SHARED(float, box, 64);
  box[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

__global__ void unaligned(float* out) {
  float x[4];
  bridge::load(out + 1, x);
  out[threadIdx.x] = x[0];
}

__global__ void never_waited(float* out) {
  BRIDGE_SHARED(float, box, 256);
  bridge::copy_async(box + 4 * threadIdx.x, out, true);
  bridge::copy_commit();
}

__global__ void no_barrier(float* out) {
  BRIDGE_SHARED(float, box, 64);
  box[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = box[63 - threadIdx.x];
}

__global__ void outside(float* out) { out[threadIdx.x + 1] = 1.0f; }

// Runs the wrong kernel; coming back without a complaint is the error.
int wrong(const char* name) {
  const std::pair<const char*, void (*)(float*)> kernels[] = {
      {"left_early", left_early},     {"two_places", two_places}, {"half_a_warp", half_a_warp},
      {"shared_overrun", shared_overrun}, {"unaligned", unaligned},   {"never_waited", never_waited},
      {"no_barrier", no_barrier},     {"outside", outside}};
  for (const auto& [known, kernel] : kernels) {
    if (std::strcmp(known, name) == 0) {
      context() = name;
      auto* run = kernel;
      under_every_schedule([&] {
        Buffer<float> out(64);
        launched(launch(run, dim3(1), dim3(64), 0, nullptr, out.data()));
        return Outputs{{"out", out.values()}};
      });
      return finish(name);
    }
  }
  emulation::fail("no kernel is wrong as `%s`", name);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    return wrong(arguments[2]);
  }
  products();
  return finish("emulation");
}
