// One rank's load by the library beside a plain pread of as many bytes of the same files, in turns.
//
//   ffi_load CHECKPOINT TENSOR_MODEL_PARALLEL_SIZE RANK THREADS ROUNDS
//
// Prints one JSON object. Destinations are faulted in before, so that neither side pays for fresh
// pages.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "megatron_bridge/megatron_bridge.h"
#include "megatron_bridge/megatron_bridge.hpp"

namespace mb = megatron_bridge;
using Clock = std::chrono::steady_clock;

namespace {

constexpr std::size_t kBlock = std::size_t{1} << 20;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// A block of a file and where it goes.
struct Block {
  int file;
  off_t offset;
  std::size_t length;
  char* into;
};

double plain_read(const std::vector<Block>& blocks, std::size_t threads) {
  const auto start = Clock::now();
  std::atomic<std::size_t> next = 0;
  std::vector<std::thread> pool;
  for (std::size_t number = 0; number < threads; ++number) {
    pool.emplace_back([&] {
      for (std::size_t at = next++; at < blocks.size(); at = next++) {
        const Block& block = blocks[at];
        if (pread(block.file, block.into, block.length, block.offset) !=
            static_cast<ssize_t>(block.length)) {
          std::perror("pread");
          std::exit(1);
        }
      }
    });
  }
  for (std::thread& thread : pool) {
    thread.join();
  }
  return seconds_since(start);
}

std::size_t status_kib(const char* key) {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.rfind(key, 0) == 0) {
      return std::strtoull(line.c_str() + std::strlen(key) + 1, nullptr, 10);
    }
  }
  return 0;
}

template <class Call>
double nanoseconds_a_call(Call&& call) {
  constexpr int kCalls = 1'000'000;
  const auto start = Clock::now();
  for (int number = 0; number < kCalls; ++number) {
    call();
  }
  return seconds_since(start) / kCalls * 1e9;
}

}  // namespace

int main(int count, char** words) {
  if (count != 6) {
    std::cerr << "ffi_load CHECKPOINT TENSOR_MODEL_PARALLEL_SIZE RANK THREADS ROUNDS\n";
    return 2;
  }
  const std::string dir = words[1];
  mb::ParallelLayout layout;
  layout.tensor_model_parallel_size = std::strtoull(words[2], nullptr, 10);
  const std::size_t rank = std::strtoull(words[3], nullptr, 10);
  const std::size_t threads = std::strtoull(words[4], nullptr, 10);
  const int rounds = std::atoi(words[5]);

  const auto opening = Clock::now();
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(dir);
  const mb::Plan plan = checkpoint.plan(layout, mb::RankCoord::of(rank));
  const double open_seconds = seconds_since(opening);

  std::vector<std::vector<char>> memory;
  std::vector<mb::Destination> destinations;
  for (const mb::TensorInfo& tensor : plan) {
    memory.emplace_back(tensor.bytes, 1);
    destinations.push_back({tensor.name, memory.back().data(), tensor.bytes, tensor.dtype});
  }

  // As many bytes of the same files, one after the other.
  std::vector<Block> blocks;
  std::size_t tensor = 0;
  std::size_t filled = 0;
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    if (entry.path().extension() == ".safetensors") {
      files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  for (const auto& path : files) {
    const int file = open(path.c_str(), O_RDONLY);
    const auto size = std::filesystem::file_size(path);
    std::size_t at = 0;
    while (at < size && tensor < memory.size()) {
      const std::size_t room = memory[tensor].size() - filled;
      const std::size_t length = std::min({room, size - at, kBlock});
      blocks.push_back({file, static_cast<off_t>(at), length, memory[tensor].data() + filled});
      at += length;
      filled += length;
      if (filled == memory[tensor].size()) {
        ++tensor;
        filled = 0;
      }
    }
  }

  mb::LoadOptions options;
  options.threads = threads;
  mb::LoadOptions unchecked = options;
  unchecked.allow_non_finite = true;
  std::vector<double> plain;
  std::vector<double> loaded;
  std::vector<double> loaded_unchecked;
  std::size_t extra_kib = 0;
  for (int round = 0; round < rounds; ++round) {
    plain.push_back(plain_read(blocks, threads));
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak begins anew
    const std::size_t before = status_kib("VmRSS:");
    const auto start = Clock::now();
    plan.load_all(destinations, options);
    loaded.push_back(seconds_since(start));
    extra_kib = std::max(extra_kib, status_kib("VmHWM:") - std::min(status_kib("VmHWM:"), before));
    const auto again = Clock::now();
    plan.load_all(destinations, unchecked);
    loaded_unchecked.push_back(seconds_since(again));
  }

  bridge_checkpoint* c_checkpoint = nullptr;
  bridge_plan* c_plan = nullptr;
  if (bridge_checkpoint_open(dir.c_str(), nullptr, &c_checkpoint, nullptr) != BRIDGE_OK ||
      bridge_checkpoint_plan(c_checkpoint, nullptr, nullptr, &c_plan, nullptr) != BRIDGE_OK) {
    return 1;
  }
  const std::string name = plan[plan.size() / 2].name;
  bridge_tensor found;
  std::size_t index = 0;
  mb::Destination nothing = destinations[plan.size() / 2];
  nothing.num_rows = 0;
  nothing.bytes = 0;
  const double version_ns = nanoseconds_a_call([] { bridge_abi_version(); });
  const double tensor_ns =
      nanoseconds_a_call([&] { bridge_plan_tensor(c_plan, 0, &found, nullptr); });
  const double find_ns =
      nanoseconds_a_call([&] { bridge_plan_find(c_plan, name.c_str(), &index, nullptr); });
  const double load_ns = nanoseconds_a_call([&] { plan.load(nothing); });

  std::size_t plain_bytes = 0;
  for (const Block& block : blocks) {
    plain_bytes += block.length;
  }
  std::printf(
      "{\"bytes\": %llu, \"plain_bytes\": %zu, \"threads\": %zu, \"open_and_plan_s\": %.4f, "
      "\"plain_s\": %.4f, \"load_s\": %.4f, \"load_unchecked_s\": %.4f, \"speed_of_plain\": %.3f, "
      "\"unchecked_speed_of_plain\": %.3f, \"extra_peak_kib\": %zu, \"ns_abi_version\": %.1f, "
      "\"ns_plan_tensor\": %.1f, \"ns_plan_find\": %.1f, \"ns_load_of_no_rows\": %.1f}\n",
      static_cast<unsigned long long>(plan.bytes()), plain_bytes, threads, open_seconds,
      median(plain), median(loaded), median(loaded_unchecked),
      median(plain) / median(loaded) * static_cast<double>(plan.bytes()) /
          static_cast<double>(plain_bytes),
      median(plain) / median(loaded_unchecked) * static_cast<double>(plan.bytes()) /
          static_cast<double>(plain_bytes),
      extra_kib, version_ns, tensor_ns, find_ns, load_ns);
  bridge_plan_free(c_plan);
  bridge_checkpoint_free(c_checkpoint);
}
