// One process of a Megatron-Core job as far as its parameters go: builds the tensors of its rank,
// fills them from a Hugging Face checkpoint, changes them, and takes part in the export.
//
//   launch.sh 8 megatron_job --model DIR --tp 2 --pp 2 --ep 2 --etp 2 --factor 2 --export OUT
//   --export-id try1
//
// RANK and WORLD_SIZE come from the environment, as torchrun, Slurm scripts and launch.sh set them.
// --expect DIR compares the filled tensors with DIR/RANK: a line a tensor, `NAME SHA256`.
// The step multiplies every parameter by --factor; by a power of two nothing is rounded.

#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <map>
#include <megatron_bridge/torch.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "parameters.hpp"
#include "sha256.hpp"

namespace mb = megatron_bridge;

namespace {

struct Arguments {
  std::string model;
  mb::ParallelLayout layout;
  std::string expect;
  double factor = 1.0;
  std::string export_to;
  std::string export_id;
};

Arguments parse(const std::vector<std::string>& words) {
  std::map<std::string, std::string> options;
  for (std::size_t at = 0; at + 1 < words.size(); at += 2) {
    options[words[at]] = words[at + 1];
  }
  const auto take = [&](const std::string& name, const std::string& without) {
    const auto found = options.find(name);
    const std::string value = found == options.end() ? without : found->second;
    options.erase(name);
    return value;
  };
  Arguments arguments;
  arguments.model = take("--model", "");
  arguments.layout.tensor_model_parallel_size = std::stoull(take("--tp", "1"));
  arguments.layout.pipeline_model_parallel_size = std::stoull(take("--pp", "1"));
  arguments.layout.expert_model_parallel_size = std::stoull(take("--ep", "1"));
  arguments.layout.expert_tensor_parallel_size = std::stoull(take("--etp", "1"));
  arguments.expect = take("--expect", "");
  arguments.factor = std::stod(take("--factor", "1"));
  arguments.export_to = take("--export", "");
  arguments.export_id = take("--export-id", "");
  if (arguments.model.empty() || words.size() % 2 != 0 || !options.empty()) {
    throw std::invalid_argument(
        "usage: megatron_job --model DIR [--tp N] [--pp N] [--ep N] [--etp N] [--expect DIR] "
        "[--factor X] [--export DIR --export-id ID]" +
        (options.empty() ? std::string() : "; unknown option `" + options.begin()->first + "`"));
  }
  return arguments;
}

std::size_t environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) {
    throw std::runtime_error(std::string(name) +
                             " is not set; start the job with launch.sh or torchrun --no-python");
  }
  return std::stoull(value);
}

/// How many tensors are not those of the list.
std::size_t compare(const mb::StateDict& parameters, const std::string& file) {
  std::ifstream list(file);
  if (!list) {
    throw std::runtime_error("cannot read " + file);
  }
  std::map<std::string, std::string> expected;
  for (std::string name, digest; list >> name >> digest;) {
    expected[name] = digest;
  }
  std::size_t wrong = expected.size() == parameters.size() ? 0 : 1;
  if (wrong > 0) {
    std::cerr << file << " lists " << expected.size() << " tensors, the rank has "
              << parameters.size() << '\n';
  }
  for (const auto& [name, tensor] : parameters) {
    if (sha256(tensor.data_ptr(), tensor.nbytes()) != expected[name]) {
      std::cerr << name << " is not the one of " << file << '\n';
      ++wrong;
    }
  }
  return wrong;
}

Job job_of(const mb::ParallelLayout& layout, const mb::RankPlace& place) {
  Job job;
  job.tp_size = static_cast<std::int64_t>(layout.tensor_model_parallel_size);
  job.pp_size = static_cast<std::int64_t>(layout.pipeline_model_parallel_size);
  job.ep_size = static_cast<std::int64_t>(layout.expert_model_parallel_size);
  job.etp_size = static_cast<std::int64_t>(layout.expert_tensor_parallel_size);
  job.pp_rank = static_cast<std::int64_t>(place.pp_rank);
  return job;
}

int run(const Arguments& arguments) {
  const std::size_t rank = environment("RANK");
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(arguments.model);
  const std::size_t world_size = checkpoint.layout(arguments.layout).world_size;
  if (environment("WORLD_SIZE") != world_size) {
    throw std::runtime_error("the layout is one of " + std::to_string(world_size) + " ranks");
  }
  const mb::RankCoord coord = mb::RankCoord::of(rank);
  const mb::Plan plan = checkpoint.plan(arguments.layout, coord);

  mb::StateDict parameters = build_parameters(checkpoint.provider(), VisionConfig{},
                                              job_of(arguments.layout, plan.place()), at::kFloat);
  const mb::LoadReport report = mb::load_state_dict(plan, parameters);
  if (!arguments.expect.empty() &&
      compare(parameters, arguments.expect + "/" + std::to_string(rank)) > 0) {
    return EXIT_FAILURE;
  }

  const at::NoGradGuard no_grad;
  for (auto& [name, tensor] : parameters) {
    tensor.mul_(arguments.factor);
  }

  std::string exported;
  if (!arguments.export_to.empty()) {
    mb::ExportOptions options;
    options.export_id = arguments.export_id;
    const mb::Exporter exporter =
        mb::Exporter::open(checkpoint, arguments.layout, coord, arguments.export_to, options);
    mb::write_state_dict(exporter, parameters);
    exported = exporter.finish().complete ? ", export complete" : ", part exported";
  }
  // One write, so that lines of several processes do not mix.
  std::cout << "rank " + std::to_string(rank) + ": " + std::to_string(report.tensors) +
                   " tensors loaded" + exported + "\n"
            << std::flush;
  return EXIT_SUCCESS;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(parse({words + 1, words + count}));
  } catch (const std::exception& error) {
    std::cerr << std::string("error: ") + error.what() + "\n";
    return EXIT_FAILURE;
  }
}
