// One rank's load by the library beside plain preads, in turns: of the very ranges that the rank's
// plan names, and of as many bytes of the same files that follow each other.
//
//   ffi_load CHECKPOINT TENSOR_MODEL_PARALLEL_SIZE RANK THREADS ROUNDS
//
// Prints one JSON object. Destinations are faulted in before, so that no side pays for fresh pages.
//
// The interface does not show a plan's copies, so the ranges are those of a first load, whose calls
// of pread64 pass through this program; runs that the library cuts into pieces are joined again.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "megatron_bridge/megatron_bridge.h"
#include "megatron_bridge/megatron_bridge.hpp"

namespace mb = megatron_bridge;
using Clock = std::chrono::steady_clock;

namespace {

constexpr std::size_t kBlock = std::size_t{1} << 20;

// Of all threads: beside other work it says more than the time on the wall.
double cpu_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

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

// What the library reads while `recording`.
std::atomic<bool> recording = false;
std::mutex recorded_lock;
std::vector<Block> recorded;

}  // namespace

// Stands before that of the C library.
extern "C" ssize_t pread64(int file, void* into, std::size_t length, off64_t offset) {
  if (recording) {
    const std::lock_guard<std::mutex> guard(recorded_lock);
    recorded.push_back({file, offset, length, static_cast<char*>(into)});
  }
  return syscall(SYS_pread64, file, into, length, offset);
}

namespace {

void plain_read(const std::vector<Block>& blocks, std::size_t threads) {
  std::atomic<std::size_t> next = 0;
  std::vector<std::thread> pool;
  for (std::size_t number = 0; number < threads; ++number) {
    pool.emplace_back([&] {
      for (std::size_t at = next++; at < blocks.size(); at = next++) {
        const Block& block = blocks[at];
        if (pread64(block.file, block.into, block.length, block.offset) !=
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
}

// What the rounds of one way took.
struct Times {
  std::vector<double> wall;
  std::vector<double> cpu;

  template <class Work>
  void add(Work&& work) {
    const auto start = Clock::now();
    const double cpu_start = cpu_seconds();
    work();
    wall.push_back(seconds_since(start));
    cpu.push_back(cpu_seconds() - cpu_start);
  }
};

// The recorded reads in blocks: touching ones are joined and then cut as those of the other side.
// What the library read into buffers of its own, to cast it, goes to `elsewhere`.
std::vector<Block> blocks_of_plan(std::vector<std::vector<char>>& memory,
                                  std::vector<std::vector<char>>& elsewhere) {
  for (Block& block : recorded) {
    const bool in_place = std::any_of(memory.begin(), memory.end(), [&](std::vector<char>& tensor) {
      return block.into >= tensor.data() && block.into < tensor.data() + tensor.size();
    });
    if (!in_place) {
      elsewhere.emplace_back(block.length, 1);
      block.into = elsewhere.back().data();
    }
  }
  std::sort(recorded.begin(), recorded.end(),
            [](const Block& left, const Block& right) { return left.into < right.into; });
  std::vector<Block> runs;
  for (const Block& block : recorded) {
    if (!runs.empty()) {
      Block& last = runs.back();
      const auto length = static_cast<off_t>(last.length);
      if (last.file == block.file && last.offset + length == block.offset &&
          last.into + length == block.into) {
        last.length += block.length;
        continue;
      }
    }
    runs.push_back(block);
  }
  std::vector<Block> blocks;
  for (const Block& run : runs) {
    for (std::size_t at = 0; at < run.length; at += kBlock) {
      blocks.push_back({run.file, run.offset + static_cast<off_t>(at),
                        std::min(kBlock, run.length - at), run.into + at});
    }
  }
  return blocks;
}

std::size_t bytes_of(const std::vector<Block>& blocks) {
  std::size_t bytes = 0;
  for (const Block& block : blocks) {
    bytes += block.length;
  }
  return bytes;
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

  mb::LoadOptions options;
  options.threads = threads;
  recording = true;
  plan.load_all(destinations, options);
  recording = false;
  std::vector<std::vector<char>> elsewhere;
  const std::vector<Block> same_ranges = blocks_of_plan(memory, elsewhere);
  if (bytes_of(same_ranges) != plan.bytes()) {
    std::cerr << "the library read " << bytes_of(same_ranges) << " bytes by pread64, the rank has "
              << plan.bytes() << "\n";
    return 1;
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

  mb::LoadOptions unchecked = options;
  unchecked.allow_non_finite = true;
  Times contiguous;
  Times same;
  Times loaded;
  Times loaded_unchecked;
  std::size_t extra_kib = 0;
  for (int round = 0; round < rounds; ++round) {
    contiguous.add([&] { plain_read(blocks, threads); });
    same.add([&] { plain_read(same_ranges, threads); });
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak begins anew
    const std::size_t before = status_kib("VmRSS:");
    loaded.add([&] { plan.load_all(destinations, options); });
    extra_kib = std::max(extra_kib, status_kib("VmHWM:") - std::min(status_kib("VmHWM:"), before));
    loaded_unchecked.add([&] { plan.load_all(destinations, unchecked); });
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

  // Bytes a second beside those of plain preads.
  const double whole = static_cast<double>(plan.bytes());
  const double part = whole / static_cast<double>(bytes_of(blocks));
  std::printf(
      "{\"bytes\": %llu, \"ranges\": %zu, \"threads\": %zu, \"open_and_plan_s\": %.4f, "
      "\"same_ranges_s\": %.4f, \"contiguous_s\": %.4f, \"load_s\": %.4f, "
      "\"load_unchecked_s\": %.4f, \"speed_of_same_ranges\": %.3f, "
      "\"speed_of_contiguous\": %.3f, \"unchecked_speed_of_same_ranges\": %.3f, "
      "\"cpu_of_same_ranges\": %.3f, \"cpu_of_contiguous\": %.3f, \"extra_peak_kib\": %zu, "
      "\"ns_abi_version\": %.1f, \"ns_plan_tensor\": %.1f, \"ns_plan_find\": %.1f, "
      "\"ns_load_of_no_rows\": %.1f}\n",
      static_cast<unsigned long long>(plan.bytes()), same_ranges.size(), threads, open_seconds,
      median(same.wall), median(contiguous.wall), median(loaded.wall),
      median(loaded_unchecked.wall), median(same.wall) / median(loaded.wall),
      median(contiguous.wall) / median(loaded.wall) * part,
      median(same.wall) / median(loaded_unchecked.wall), median(same.cpu) / median(loaded.cpu),
      median(contiguous.cpu) / median(loaded.cpu) * part, extra_kib, version_ns, tensor_ns, find_ns,
      load_ns);
  bridge_plan_free(c_plan);
  bridge_checkpoint_free(c_checkpoint);
}
