// Several threads at once: loads of one plan, plans of one checkpoint, an export in which each
// thread is a rank, a cancellation from outside.
//   threads_test CHECKPOINT EMPTY_DIR

#include <array>
#include <cstdint>
#include <exception>
#include <megatron_bridge/megatron_bridge.hpp>
#include <mutex>
#include <thread>
#include <vector>

#include "check.hpp"

#if defined(__has_include)
#if __has_include(<valgrind/helgrind.h>)
#include <valgrind/helgrind.h>
#endif
#endif
#if !defined(VALGRIND_HG_CLEAN_MEMORY)
#define VALGRIND_HG_CLEAN_MEMORY(start, bytes) static_cast<void>(0)
#endif

namespace mb = megatron_bridge;

namespace {

using Bytes = std::vector<std::vector<std::uint8_t>>;

Bytes load(const mb::Plan& plan, const mb::LoadOptions& options = {}) {
  Bytes bytes;
  std::vector<mb::Destination> destinations;
  for (const mb::TensorInfo& tensor : plan) {
    bytes.emplace_back(tensor.bytes);
    mb::Destination destination;
    destination.name = tensor.name;
    destination.data = bytes.back().data();
    destination.bytes = tensor.bytes;
    destination.dtype = tensor.dtype;
    destinations.push_back(destination);
  }
  plan.load_all(destinations, options);
  // The library's threads have ended. Helgrind cannot see that: they are joined by what Rust's own
  // locks say.
  for (std::vector<std::uint8_t>& tensor : bytes) {
    VALGRIND_HG_CLEAN_MEMORY(tensor.data(), tensor.size());
  }
  return bytes;
}

/// Runs `work(0)`, `work(1)`, ... in threads of their own and passes on what one of them threw.
template <class Work>
void in_threads(std::size_t count, const Work& work) {
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> thrown(count);
  for (std::size_t number = 0; number < count; ++number) {
    threads.emplace_back([&, number] {
      try {
        work(number);
      } catch (...) {
        thrown[number] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const std::exception_ptr& error : thrown) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

void loads(const mb::Checkpoint& checkpoint) {
  const mb::Plan plan = checkpoint.plan();
  const Bytes expected = load(plan);
  std::array<bool, 4> same{};
  in_threads(same.size(), [&](std::size_t number) {
    mb::LoadOptions options;
    options.threads = 2;
    // Half of them through a copy of the handle, half through the same one.
    const mb::Plan own = number % 2 == 0 ? plan : mb::Plan(plan);
    same[number] = load(own, options) == expected;
  });
  check("four loads of one plan at once give what one gives",
        same == std::array<bool, 4>{true, true, true, true});
}

void ranks(const mb::Checkpoint& checkpoint, const std::string& target) {
  mb::ParallelLayout layout;
  layout.tensor_model_parallel_size = 2;
  layout.pipeline_model_parallel_size = 2;
  std::mutex lock;
  std::size_t completed = 0;
  in_threads(4, [&](std::size_t rank) {
    const mb::RankCoord coord = mb::RankCoord::of(rank);
    const mb::Plan plan = checkpoint.plan(layout, coord);
    const Bytes bytes = load(plan);
    mb::ExportOptions options;
    options.export_id = "threads";
    const mb::Exporter exporter = mb::Exporter::open(checkpoint, layout, coord, target, options);
    std::vector<mb::Source> sources;
    for (std::size_t index = 0; index < plan.size(); ++index) {
      mb::Source source;
      source.name = plan[index].name;
      source.data = bytes[index].data();
      source.bytes = bytes[index].size();
      source.dtype = plan[index].dtype;
      sources.push_back(source);
    }
    exporter.write_all(sources);
    const bool complete = exporter.finish().complete;
    const std::lock_guard<std::mutex> held(lock);
    completed += complete ? 1 : 0;
  });
  check("four ranks that export at once hear of its completion", completed > 0);
  check("what they export is the checkpoint",
        load(mb::Checkpoint::open(target).plan()) == load(checkpoint.plan()));
}

void cancellation(const mb::Checkpoint& checkpoint) {
  const mb::Plan plan = checkpoint.plan();
  const mb::Cancellation cancellation;
  std::thread other([&] { cancellation.cancel(); });
  other.join();
  mb::LoadOptions options;
  options.cancellation = cancellation;
  check_refused("a call that was cancelled from another thread", mb::ErrorCode::cancelled, "cancel",
                [&] { load(plan, options); });
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::cerr << "usage: threads_test CHECKPOINT EMPTY_DIR\n";
    return 2;
  }
  try {
    const mb::Checkpoint checkpoint = mb::Checkpoint::open(words[1]);
    loads(checkpoint);
    ranks(checkpoint, std::string(words[2]) + "/exported");
    cancellation(checkpoint);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return failures == 0 ? 0 : 1;
}
