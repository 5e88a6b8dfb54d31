// Prints what one Megatron-Core rank holds of a checkpoint, loads it, and checks that a second way
// to load it gives the same bytes.
//
//   rank_loader CHECKPOINT RANK [--tp N] [--pp N] [--ep N] [--etp N] [--raw DIR]
//
// --raw writes the bytes of each tensor to DIR/NAME.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <megatron_bridge/megatron_bridge.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace mb = megatron_bridge;

namespace {

struct Arguments {
  std::string checkpoint;
  std::size_t rank = 0;
  mb::ParallelLayout layout;
  std::string raw;
};

std::size_t number(const std::string& text) {
  std::size_t used = 0;
  const std::size_t value = std::stoull(text, &used);
  if (used != text.size()) {
    throw std::invalid_argument("`" + text + "` is no number");
  }
  return value;
}

Arguments parse(const std::vector<std::string>& words) {
  if (words.size() < 2 || words.size() % 2 != 0) {
    throw std::invalid_argument(
        "usage: rank_loader CHECKPOINT RANK [--tp N] [--pp N] [--ep N] [--etp N] [--raw DIR]");
  }
  Arguments arguments;
  arguments.checkpoint = words[0];
  arguments.rank = number(words[1]);
  for (std::size_t at = 2; at < words.size(); at += 2) {
    const std::string& value = words[at + 1];
    if (words[at] == "--tp") {
      arguments.layout.tensor_model_parallel_size = number(value);
    } else if (words[at] == "--pp") {
      arguments.layout.pipeline_model_parallel_size = number(value);
    } else if (words[at] == "--ep") {
      arguments.layout.expert_model_parallel_size = number(value);
    } else if (words[at] == "--etp") {
      arguments.layout.expert_tensor_parallel_size = number(value);
    } else if (words[at] == "--raw") {
      arguments.raw = value;
    } else {
      throw std::invalid_argument("unknown option `" + words[at] + "`");
    }
  }
  return arguments;
}

/// Memory for a tensor with a margin on both sides, to see that nothing outside is touched.
class GuardedBytes {
 public:
  explicit GuardedBytes(std::size_t size) : bytes_(size + 2 * kMargin, kUntouched) {}

  std::uint8_t* data() { return bytes_.data() + kMargin; }
  std::size_t size() const { return bytes_.size() - 2 * kMargin; }
  bool same_content(const GuardedBytes& other) const { return bytes_ == other.bytes_; }

  bool margins_are_untouched() const {
    const auto untouched = [](std::uint8_t byte) { return byte == kUntouched; };
    return std::all_of(bytes_.begin(), bytes_.begin() + kMargin, untouched) &&
           std::all_of(bytes_.end() - kMargin, bytes_.end(), untouched);
  }

 private:
  static constexpr std::ptrdiff_t kMargin = 64;
  static constexpr std::uint8_t kUntouched = 0xA5;
  std::vector<std::uint8_t> bytes_;
};

void print(const mb::TensorInfo& tensor) {
  std::cout << tensor.name << ' ' << mb::to_string(tensor.dtype) << " [";
  for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) {
    std::cout << (axis == 0 ? "" : ", ") << tensor.shape[axis];
  }
  std::cout << "]\n";
}

/// Loads the upper and the lower half of the rows by themselves.
GuardedBytes load_halves(const mb::Plan& plan, const mb::TensorInfo& tensor) {
  GuardedBytes memory(tensor.bytes);
  const std::size_t rows = tensor.shape.empty() ? 1 : tensor.shape[0];
  if (rows < 2) {
    plan.load(tensor.name, memory.data(), memory.size(), tensor.dtype);
    return memory;
  }
  const std::size_t row_bytes = tensor.bytes / rows;
  const std::size_t middle = rows / 2;
  mb::Destination half;
  half.name = tensor.name;
  half.dtype = tensor.dtype;
  half.data = memory.data();
  half.bytes = middle * row_bytes;
  half.num_rows = middle;
  plan.load(half);
  half.data = memory.data() + middle * row_bytes;
  half.bytes = (rows - middle) * row_bytes;
  half.first_row = middle;
  half.num_rows = rows - middle;
  plan.load(half);
  return memory;
}

void write(const std::string& path, GuardedBytes& memory) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(memory.data()),
             static_cast<std::streamsize>(memory.size()));
  if (!file.flush()) {
    throw std::runtime_error("cannot write " + path);
  }
}

int run(const Arguments& arguments) {
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(arguments.checkpoint);
  const mb::Provider provider = checkpoint.provider();
  const mb::LayoutInfo layout = checkpoint.layout(arguments.layout);
  const mb::Plan plan = checkpoint.plan(arguments.layout, mb::RankCoord::of(arguments.rank));
  const mb::RankPlace& place = plan.place();
  std::cout << provider.class_name() << ", " << provider.num_layers() << " layers\n"
            << "rank " << place.global_rank << " of " << layout.world_size << ": tp "
            << place.tp_rank << ", pp " << place.pp_rank << ", dp " << place.dp_rank << ", ep "
            << place.ep_rank << ", etp " << place.etp_rank << '\n';

  std::vector<GuardedBytes> memory;
  std::vector<mb::Destination> destinations;
  memory.reserve(plan.size());
  for (const mb::TensorInfo& tensor : plan) {
    print(tensor);
    GuardedBytes& own = memory.emplace_back(tensor.bytes);
    mb::Destination destination;
    destination.name = tensor.name;
    destination.data = own.data();
    destination.bytes = own.size();
    destination.dtype = tensor.dtype;
    destinations.push_back(destination);
  }
  const mb::LoadReport report = plan.load_all(destinations);
  std::cout << report.tensors << " tensors, " << report.bytes << " bytes, " << report.rounded
            << " rounded\n";

  std::size_t wrong = 0;
  for (std::size_t index = 0; index < plan.size(); ++index) {
    const mb::TensorInfo& tensor = plan[index];
    if (!memory[index].margins_are_untouched()) {
      std::cerr << tensor.name << ": bytes outside the tensor were written\n";
      ++wrong;
    }
    if (!memory[index].same_content(load_halves(plan, tensor))) {
      std::cerr << tensor.name << ": loaded in halves it is another\n";
      ++wrong;
    }
    if (!arguments.raw.empty()) {
      write(arguments.raw + "/" + tensor.name, memory[index]);
    }
  }
  if (wrong > 0) {
    return EXIT_FAILURE;
  }
  std::cout << "checked\n";
  return EXIT_SUCCESS;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(parse({words + 1, words + count}));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return EXIT_FAILURE;
  }
}
