// AdamW over many tensors.
#include "../adamw.hpp"

#include <ATen/ops/empty.h>

#include "library.hpp"

namespace bridge::operators {

namespace {

using OptionalTensors = c10::List<OptionalTensor>;

// A name for messages: masters[3].
struct Place {
  const char* list;
  size_t index;
};
std::ostream& operator<<(std::ostream& out, const Place& place) { return out << place.list << '[' << place.index << ']'; }

// Kernels walk over memory by addresses of their own.
void check_memory(const at::Tensor& x, Place place, const at::Tensor& like, at::ScalarType kind, int64_t numel) {
  TORCH_CHECK(x.device() == like.device(), place, " is on ", x.device(), ", but parameters[0] is on ", like.device());
  TORCH_CHECK(x.scalar_type() == kind, place, " is ", x.scalar_type(), ", but ", kind, " is needed here");
  TORCH_CHECK(x.numel() == numel, place, " has ", x.numel(), " elements, expected ", numel);
  TORCH_CHECK(x.is_contiguous(), place, " has gaps between its elements; give its contiguous() form");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, place, " does not begin at a multiple of 16 bytes");
}

// `bytes` on `like`'s device. The copy is queued on its stream: the host does not wait.
template <class T>
at::Tensor upload(const std::vector<T>& values, const at::Tensor& like) {
  const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
  const at::Tensor host = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(like.is_cuda()));
  std::copy_n(reinterpret_cast<const uint8_t*>(values.data()), bytes, host.data_ptr<uint8_t>());
  return host.to(like.device(), /*non_blocking=*/true);
}

// What `adamw_step` takes: tensors and chunks in device memory, and for the host how many elements each tensor has, then 1 where
// moments have 8 bits.
std::vector<at::Tensor> adamw_table(at::TensorList parameters, const OptionalTensors& masters, at::TensorList exp_avg,
                                    at::TensorList exp_avg_sq, const OptionalTensors& exp_avg_scale,
                                    const OptionalTensors& exp_avg_sq_scale, at::TensorList counts,
                                    at::ArrayRef<double> weight_decays) {
  const size_t n = parameters.size();
  TORCH_CHECK(n > 0, "adamw_table was given no parameters");
  for (const auto& [name, size] : {std::pair{"masters", masters.size()}, {"exp_avg", exp_avg.size()},
                                   {"exp_avg_sq", exp_avg_sq.size()}, {"exp_avg_scale", exp_avg_scale.size()},
                                   {"exp_avg_sq_scale", exp_avg_sq_scale.size()}, {"counts", counts.size()},
                                   {"weight_decays", weight_decays.size()}}) {
    TORCH_CHECK(size == n, name, " has ", size, " entries, parameters has ", n);
  }
  const at::Tensor& like = parameters[0];
  const at::ScalarType moments = exp_avg[0].scalar_type();
  const bool eight_bit = moments == at::kByte;
  TORCH_CHECK(eight_bit || moments == at::kFloat, "exp_avg[0] is ", moments, ", but moments are float32, or uint8 with scales");
  std::vector<AdamWTensor> tensors(n);
  std::vector<AdamWChunk> chunks;
  at::Tensor sizes = at::empty({static_cast<int64_t>(n) + 1}, at::kLong);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& parameter = parameters[i];
    const int64_t numel = parameter.numel(), blocks = (numel + 255) / 256;
    AdamWTensor& t = tensors[i];
    t.dtype = dtype_of(parameter, "a parameter");
    check_memory(parameter, {"parameters", i}, like, parameter.scalar_type(), numel);
    check_memory(exp_avg[i], {"exp_avg", i}, like, moments, numel);
    check_memory(exp_avg_sq[i], {"exp_avg_sq", i}, like, moments, numel);
    check_memory(counts[i], {"counts", i}, like, at::kFloat, 1);
    t.parameter = parameter.data_ptr();
    t.exp_avg = exp_avg[i].data_ptr();
    t.exp_avg_sq = exp_avg_sq[i].data_ptr();
    t.count = counts[i].data_ptr<float>();
    t.numel = numel;
    t.weight_decay = static_cast<float>(weight_decays[i]);
    const auto floats = [&](const OptionalTensor& x, const char* list, int64_t size) {
      if (!x) {
        return static_cast<float*>(nullptr);
      }
      check_memory(*x, {list, i}, like, at::kFloat, size);
      return x->data_ptr<float>();
    };
    t.master = floats(masters[i], "masters", numel);
    t.exp_avg_scale = floats(exp_avg_scale[i], "exp_avg_scale", blocks);
    t.exp_avg_sq_scale = floats(exp_avg_sq_scale[i], "exp_avg_sq_scale", blocks);
    for (const auto& [list, scale] : {std::pair{"exp_avg_scale", t.exp_avg_scale}, {"exp_avg_sq_scale", t.exp_avg_sq_scale}}) {
      TORCH_CHECK((scale != nullptr) == eight_bit, (Place{list, i}), " is for moments of 8 bits, which need it");
    }
    for (int64_t first = 0; first < numel; first += kAdamWChunk) {
      chunks.push_back({first, static_cast<int>(i)});
    }
    sizes.data_ptr<int64_t>()[i] = numel;
  }
  sizes.data_ptr<int64_t>()[n] = eight_bit ? 1 : 0;
  return {upload(tensors, like), upload(chunks, like), sizes};
}

at::Tensor adamw_step(at::TensorList table, const OptionalTensors& gradients, double lr, double beta1, double beta2, double eps,
                      double max_norm, bool stochastic, int64_t seed) {
  TORCH_CHECK(table.size() == 3, "adamw_step wants the three tensors that adamw_table gave, not ", table.size());
  const at::Tensor &tensors = table[0], &chunks = table[1], &sizes = table[2];
  const auto n = static_cast<size_t>(sizes.numel() - 1);
  TORCH_CHECK(gradients.size() == n, "gradients has ", gradients.size(), " entries, the table has ", n);
  std::vector<at::Tensor> kept;  // until the kernels are queued
  std::vector<AdamWGradient> given(n);
  for (size_t i = 0; i < n; ++i) {
    const OptionalTensor gradient = gradients[i];
    if (!gradient) {
      continue;
    }
    const int64_t numel = sizes.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(gradient->device() == tensors.device(), (Place{"gradients", i}), " is on ", gradient->device(),
                ", but the table is on ", tensors.device());
    TORCH_CHECK(gradient->numel() == numel, (Place{"gradients", i}), " has ", gradient->numel(), " elements, its parameter has ",
                numel);
    at::Tensor memory = gradient->contiguous();
    if (reinterpret_cast<uintptr_t>(memory.const_data_ptr()) % 16 != 0) {
      memory = memory.clone();
    }
    given[i] = {memory.const_data_ptr(), dtype_of(memory, "a gradient")};
    kept.push_back(std::move(memory));
  }
  const auto bytes = [&](size_t size) { return workspace(size, tensors); };
  const auto num_chunks = chunks.numel() / static_cast<int64_t>(sizeof(AdamWChunk));
  const at::Tensor addresses = upload(given, tensors), corrections = bytes(n * sizeof(AdamWCorrection)),
                   sums = bytes(static_cast<size_t>(num_chunks) * sizeof(double));
  static_assert(sizeof(AdamWProgress) % sizeof(double) == 0, "it lies in doubles");
  const at::Tensor progress = at::empty({sizeof(AdamWProgress) / sizeof(double)}, tensors.options().dtype(at::kDouble));
  AdamW p{};
  p.tensors = reinterpret_cast<const AdamWTensor*>(tensors.const_data_ptr());
  p.gradients = reinterpret_cast<const AdamWGradient*>(addresses.const_data_ptr());
  p.chunks = reinterpret_cast<const AdamWChunk*>(chunks.const_data_ptr());
  p.corrections = reinterpret_cast<AdamWCorrection*>(corrections.data_ptr());
  p.workspace = reinterpret_cast<double*>(sums.data_ptr());
  p.progress = reinterpret_cast<AdamWProgress*>(progress.data_ptr());
  p.num_tensors = static_cast<int64_t>(n);
  p.num_chunks = num_chunks;
  p.lr = static_cast<float>(lr);
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = static_cast<float>(eps);
  p.max_norm = static_cast<float>(max_norm);
  p.eight_bit = sizes.const_data_ptr<int64_t>()[n] != 0;
  p.stochastic = stochastic;
  p.seed = static_cast<uint64_t>(seed);
  Launch("adamw_step", tensors)(bridge::adamw_step, p);
  return progress.select(0, 0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_bridge, library) {
  // Parameters bfloat16 or float32; masters float32, or none; moments float32, or uint8 with float32 scales [ceil(numel / 256)]
  // of blocks of 256; counts float32 [], the steps made. The table holds addresses: it is good for as long as these tensors live.
  define(library,
         "adamw_table(Tensor[] parameters, Tensor?[] masters, Tensor[] exp_avg, Tensor[] exp_avg_sq, Tensor?[] exp_avg_scale, "
         "Tensor?[] exp_avg_sq_scale, Tensor[] counts, float[] weight_decays) -> Tensor[]",
         &adamw_table);
  // A step of every tensor that has a gradient, in place: torch.optim.AdamW behind clip_grad_norm_ (max_norm 0: no clipping).
  // Gives the norm before clipping, [] float64; nothing is changed if that is not finite. `stochastic` rounds bfloat16
  // parameters without masters at random, without bias, by `seed`.
  define(library,
         "adamw_step(Tensor[] table, Tensor?[] gradients, float lr, float beta1, float beta2, float eps, float max_norm, "
         "bool stochastic, int seed) -> Tensor",
         &adamw_step);
}

}  // namespace bridge::operators
