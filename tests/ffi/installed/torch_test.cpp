// megatron_bridge/torch.hpp on the CPU and on a device:
//   torch_test CHECKPOINT EMPTY_DIR

#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <exception>
#include <megatron_bridge/torch.hpp>
#include <stdexcept>

#include "check.hpp"
#include "fake_device.hpp"

namespace mb = megatron_bridge;

namespace {

const char kNorm[] = "language_model.decoder.final_layernorm.weight";

/// What every way to load must give: each tensor by itself, without torch.hpp.
mb::StateDict one_by_one(const mb::Plan& plan) {
  mb::StateDict expected = mb::empty_state_dict(plan);
  for (const mb::TensorInfo& info : plan) {
    plan.load(info.name, expected.at(info.name).data_ptr(), info.bytes, info.dtype);
  }
  return expected;
}

bool equal(const mb::StateDict& found, const mb::StateDict& expected) {
  if (found.size() != expected.size()) {
    return false;
  }
  for (const auto& [name, tensor] : expected) {
    if (!at::equal(found.at(name).to(at::kCPU), tensor)) {
      std::cout << "       " << name << " differs" << std::endl;
      return false;
    }
  }
  return true;
}

/// The whole tensors with the last axis first in memory.
at::Tensor transposed(const at::Tensor& like) {
  return at::full(like.sizes(), -1.0, like.options())
      .transpose(0, -1)
      .contiguous()
      .transpose(0, -1);
}

void on_the_cpu(const mb::Plan& plan, const mb::StateDict& expected) {
  const mb::StateDict loaded = mb::empty_state_dict(plan);
  const mb::LoadReport report = mb::load_state_dict(plan, loaded);
  check("tensors on the CPU are filled in place", equal(loaded, expected));
  check("the report counts them", report.tensors == plan.size() && report.bytes == plan.bytes());

  mb::StateDict halves = mb::empty_state_dict(plan, at::TensorOptions().dtype(at::kBFloat16));
  mb::load_state_dict(plan, halves);
  bool rounded = true;
  for (const auto& [name, tensor] : expected) {
    rounded = rounded && at::equal(halves.at(name), tensor.to(at::kBFloat16));
  }
  check("values are cast to the tensors' own dtype as torch casts them", rounded);

  mb::StateDict strided;
  mb::StateDict margins;
  for (const auto& [name, tensor] : expected) {
    if (tensor.dim() == 2 && strided.size() % 2 == 0) {
      // A part of wider rows: the library knows their stride.
      at::Tensor wide = at::full({tensor.size(0), tensor.size(1) + 3}, 7.0, tensor.options());
      margins.emplace(name, wide.narrow(1, tensor.size(1), 3));
      strided.emplace(name, wide.narrow(1, 0, tensor.size(1)));
    } else {
      strided.emplace(name, transposed(tensor));
    }
  }
  mb::TorchOptions small;
  small.staging_bytes = 4096;
  const mb::LoadReport of_strided = mb::load_state_dict(plan, strided, small);
  check("tensors of any strides are filled", equal(strided, expected));
  check("each of them counts once in the report", of_strided.tensors == plan.size() &&
                                                      of_strided.bytes == plan.bytes() &&
                                                      of_strided.rounded == report.rounded);
  bool untouched = true;
  for (const auto& [name, margin] : margins) {
    untouched = untouched && at::equal(margin, at::full(margin.sizes(), 7.0, margin.options()));
  }
  check("what stands beside their rows is untouched", untouched);

  mb::StateDict with_extra = mb::empty_state_dict(plan);
  const at::Tensor state = at::full({5}, 3, at::TensorOptions().dtype(at::kByte));
  with_extra.emplace("language_model.decoder.layers.0.mlp.linear_fc1._extra_state", state);
  const auto version = with_extra.at(kNorm)._version();
  mb::load_state_dict(plan, with_extra);
  check("an _extra_state is left alone", at::equal(state, at::full({5}, 3, state.options())));
  check("autograd sees that a tensor was changed", with_extra.at(kNorm)._version() > version);

  at::Tensor norm = at::zeros(expected.at(kNorm).sizes());
  norm.set_requires_grad(true);
  mb::load_tensor(plan, kNorm, norm);
  check("one tensor, that requires a gradient", at::equal(norm, expected.at(kNorm)));
}

void on_a_device(const mb::Plan& plan, const mb::StateDict& expected) {
  for (const std::size_t buffers : {1, 2, 3}) {
    for (const std::size_t bytes : {std::size_t{1}, std::size_t{4096}, std::size_t{64} << 20}) {
      const std::string name =
          std::to_string(buffers) + " staging buffers of " + std::to_string(bytes) + " bytes";
      const mb::StateDict loaded =
          mb::empty_state_dict(plan, at::TensorOptions().device(fake_device::device()));
      // The job's own work on these tensors is still queued when the load begins.
      const mb::StateDict zeros = [&] {
        mb::StateDict zeros;
        for (const auto& [parameter, tensor] : loaded) {
          zeros.emplace(parameter, at::zeros(tensor.sizes(), tensor.scalar_type()));
          at::Tensor target = tensor;
          target.copy_(zeros.at(parameter), true);
        }
        return zeros;
      }();
      fake_device::reset_statistics();
      const std::size_t queued = fake_device::pending();
      mb::TorchOptions options;
      options.staging_buffers = buffers;
      options.staging_bytes = bytes;
      std::uint64_t last = 0;
      bool grows = true;
      options.load.progress = [&](const mb::Progress& now) {
        grows = grows && now.bytes_done >= last && now.bytes_total == plan.bytes();
        last = now.bytes_done;
      };
      const mb::LoadReport report = mb::load_state_dict(plan, loaded, options);
      const bool behind_the_jobs_work = fake_device::pending() == 0;
      fake_device::synchronize();
      check(name + " fill tensors on a device",
            queued == plan.size() && behind_the_jobs_work && equal(loaded, expected));
      check(name + " are pinned", fake_device::unpinned_copies() == 0);
      check(name + ": each tensor counts once",
            report.tensors == plan.size() && report.bytes == plan.bytes());
      check(name + ": progress is that of the whole", grows && last == plan.bytes());
    }
  }

  // With a small buffer its copies are the only ones that may wait; with two, those of both.
  std::size_t most[2];
  for (const std::size_t buffers : {1, 2}) {
    const mb::StateDict loaded =
        mb::empty_state_dict(plan, at::TensorOptions().device(fake_device::device()));
    mb::TorchOptions options;
    options.staging_buffers = buffers;
    options.staging_bytes = 1;
    fake_device::reset_statistics();
    mb::load_state_dict(plan, loaded, options);
    most[buffers - 1] = fake_device::most_pending();
  }
  check("copies out of one buffer go on while the next is filled", most[1] > most[0]);

  const mb::StateDict cut_short =
      mb::empty_state_dict(plan, at::TensorOptions().device(fake_device::device()));
  mb::TorchOptions options;
  options.staging_bytes = 4096;
  std::size_t calls = 0;
  options.load.progress = [&](const mb::Progress&) {
    if (++calls == 4) {
      throw std::logic_error("enough");
    }
  };
  bool thrown = false;
  try {
    mb::load_state_dict(plan, cut_short, options);
  } catch (const std::logic_error&) {
    thrown = true;
  }
  check("an error on the way waits for the copies out of its buffers",
        thrown && fake_device::pending() == 0);
}

void refusals(const mb::Plan& plan) {
  const auto with = [&](const at::Tensor& norm) {
    mb::StateDict state_dict = mb::empty_state_dict(plan);
    for (auto& [name, tensor] : state_dict) {
      tensor.zero_();
    }
    state_dict[kNorm] = norm;
    return state_dict;
  };
  const std::int64_t rows = static_cast<std::int64_t>(plan.at(kNorm).shape[0]);
  const auto refused = [&](const std::string& what, mb::ErrorCode code, const std::string& text,
                           const mb::StateDict& state_dict) {
    check_refused(what, code, text, [&] { mb::load_state_dict(plan, state_dict); });
    bool untouched = true;
    for (const auto& [name, tensor] : state_dict) {
      untouched = untouched && (name == kNorm || !tensor.is_cpu() || name.size() < 30 ||
                                at::equal(tensor, at::zeros(tensor.sizes(), tensor.options())));
    }
    check(what + ": nothing is touched", untouched);
  };
  refused("an undefined tensor", mb::ErrorCode::argument, kNorm, with(at::Tensor()));
  refused("a tensor without memory", mb::ErrorCode::argument, "meta",
          with(at::empty({rows}, at::TensorOptions().device(at::kMeta))));
  refused("another shape", mb::ErrorCode::size, "[1, " + std::to_string(rows) + "]",
          with(at::zeros({1, rows})));
  refused("a dtype of no weights", mb::ErrorCode::dtype, "Long",
          with(at::zeros({rows}, at::TensorOptions().dtype(at::kLong))));
  {
    mb::StateDict without = with(at::zeros({rows}));
    without.erase(kNorm);
    refused("a tensor that is missing", mb::ErrorCode::tensor, kNorm, without);
    mb::TorchOptions partial;
    partial.load.partial = true;
    check("a tensor may be left out where that is asked for",
          mb::load_state_dict(plan, without, partial).tensors == plan.size() - 1);
  }
  {
    mb::StateDict more = with(at::zeros({rows}));
    more.emplace("language_model.decoder.final_layernorm.bias", at::zeros({rows}));
    refused("a tensor that the rank does not hold", mb::ErrorCode::tensor,
            "language_model.decoder.final_layernorm.weight", more);
  }
  for (const at::Device device : {at::Device(at::kCPU), fake_device::device()}) {
    const at::Tensor shared = at::empty({rows + 1}, at::TensorOptions().device(device));
    mb::StateDict overlapping = with(shared.narrow(0, 0, rows));
    overlapping["language_model.mtp.layers.0.final_layernorm.weight"] = shared.narrow(0, 1, rows);
    check_refused("tensors that share memory on " + device.str(), mb::ErrorCode::overlap, kNorm,
                  [&] { mb::load_state_dict(plan, overlapping); });
  }
}

void exports(const mb::Checkpoint& checkpoint, const mb::StateDict& expected,
             const std::string& empty_dir) {
  const std::string target = empty_dir + "/exported";
  const mb::Exporter exporter = mb::Exporter::open(checkpoint, {}, {}, target);
  mb::StateDict state_dict;
  std::size_t number = 0;
  for (const auto& [name, tensor] : expected) {
    switch (number++ % 3) {
      case 0:
        state_dict.emplace(name, tensor);
        break;
      case 1:
        state_dict.emplace(name, transposed(tensor).copy_(tensor));
        break;
      default: {
        at::Tensor there =
            at::empty(tensor.sizes(), tensor.options().device(fake_device::device()));
        state_dict.emplace(name, there.copy_(tensor));
      }
    }
  }
  check_refused("a tensor that is not exported", mb::ErrorCode::tensor, "no.such.tensor",
                [&] { mb::write_state_dict(exporter, {{"no.such.tensor", expected.at(kNorm)}}); });
  mb::TorchOptions options;
  options.staging_bytes = 4096;
  const mb::LoadReport report = mb::write_state_dict(exporter, state_dict, options);
  check("every tensor is handed in once", report.tensors == expected.size());
  check("the export completes", exporter.finish().complete);
  const mb::Plan again = mb::Checkpoint::open(target).plan();
  check("tensors on the CPU, with any strides and on a device are exported",
        equal(one_by_one(again), expected));
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::cerr << "usage: torch_test CHECKPOINT EMPTY_DIR\n";
    return 2;
  }
  try {
    fake_device::install();
    const mb::Checkpoint checkpoint = mb::Checkpoint::open(words[1]);
    const mb::Plan plan = checkpoint.plan();
    const mb::StateDict expected = one_by_one(plan);
    on_the_cpu(plan, expected);
    on_a_device(plan, expected);
    refusals(plan);
    exports(checkpoint, expected, words[2]);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return failures == 0 ? 0 : 1;
}
