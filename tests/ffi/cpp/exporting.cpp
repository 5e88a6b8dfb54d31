// The way back, in one process and in several.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "cases.hpp"

using namespace cases;
using mb::ErrorCode;

namespace {

constexpr const char* kNorm = "language_model.decoder.final_layernorm.weight";

mb::ParallelLayout two_by_two() {
  mb::ParallelLayout layout;
  layout.tensor_model_parallel_size = 2;
  layout.expert_model_parallel_size = 2;
  layout.pipeline_model_parallel_size = 2;
  layout.virtual_pipeline_model_parallel_size = 2;
  return layout;
}

// What a rank of a running job would hold.
Memory loaded(const mb::Checkpoint& checkpoint, const mb::ParallelLayout& layout,
              const mb::RankCoord& rank) {
  const mb::Plan plan = checkpoint.plan(layout, rank);
  Memory memory(plan.tensors());
  plan.load_all(memory.destinations());
  return memory;
}

// Hands in all stages of a rank.
mb::ExportState export_rank(const mb::Checkpoint& checkpoint, const mb::ParallelLayout& layout,
                            std::size_t rank, const std::string& target,
                            const mb::ExportOptions& options) {
  mb::ExportState state;
  const std::size_t stages = checkpoint.layout(layout).virtual_pipeline_model_parallel_size;
  for (std::size_t stage = 0; stage < stages; ++stage) {
    const mb::RankCoord coord = mb::RankCoord::of(rank, stage);
    const Memory memory = loaded(checkpoint, layout, coord);
    const mb::Exporter exporter = mb::Exporter::open(checkpoint, layout, coord, target, options);
    exporter.write_all(memory.sources());
    state = exporter.finish();
  }
  return state;
}

}  // namespace

// One process that holds everything, in its own calls, of strided memory and by tensor.
BRIDGE_CASE(one_process_exports) {
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  const Memory memory = loaded(checkpoint, {}, {});
  const mb::Exporter exporter = mb::Exporter::open(checkpoint, {}, {}, args.scratch + "/out");
  BRIDGE_CHECK(exporter.is_needed());
  BRIDGE_CHECK_EQ(exporter.tensors().size(), memory.tensors.size());
  BRIDGE_CHECK_EQ(exporter.place().global_rank, 0u);
  const std::vector<mb::Source> sources = memory.sources();
  exporter.write(sources[0].name, sources[0].data, sources[0].bytes, sources[0].dtype);
  // A matrix with a gap behind each row.
  const mb::TensorInfo& second = memory.tensors[sources.size() - 1];
  const std::size_t row_bytes = second.bytes / second.shape[0];
  std::vector<char> wide(second.shape[0] * (row_bytes + 8));
  for (std::size_t row = 0; row < second.shape[0]; ++row) {
    const char* from = reinterpret_cast<const char*>(memory.data[sources.size() - 1].data());
    std::copy_n(from + row * row_bytes, row_bytes, wide.data() + row * (row_bytes + 8));
  }
  mb::Source strided = sources[sources.size() - 1];
  strided.data = wide.data();
  strided.bytes = wide.size() - 8;
  strided.row_stride_bytes = row_bytes + 8;
  mb::LoadOptions options;
  options.threads = 2;
  mb::Progress last;
  options.progress = [&](const mb::Progress& progress) { last = progress; };
  const std::vector<mb::Source> one = {strided};
  exporter.write_all(one, options);
  fails(ErrorCode::tensor, {"tensors of rank 0, virtual stage 0 were not handed in"},
        [&] { exporter.finish(); });
  BRIDGE_CHECK(!std::filesystem::exists(args.scratch + "/out"));
  const mb::LoadReport report = exporter.write_all(
      mb::Span<const mb::Source>(sources.data() + 1, sources.size() - 2), options);
  BRIDGE_CHECK_EQ(last.bytes_done, report.bytes);
  BRIDGE_CHECK_EQ(last.bytes_total, report.bytes);
  const mb::ExportState state = exporter.finish();
  BRIDGE_CHECK(state.complete);
  BRIDGE_CHECK_EQ(state.needed, 1u);
  BRIDGE_CHECK(exporter.finish().complete);
}

// `more` is a layout: tp, pp, vpp, ep, etp, dp; all ranks take their turns in one process.
BRIDGE_CASE(all_ranks_export) {
  std::istringstream words(args.more);
  mb::ParallelLayout layout;
  std::size_t virtual_size = 0;
  std::size_t replicas = 0;
  words >> layout.tensor_model_parallel_size >> layout.pipeline_model_parallel_size >>
      virtual_size >> layout.expert_model_parallel_size >> layout.expert_tensor_parallel_size >>
      replicas;
  if (virtual_size > 0) {
    layout.virtual_pipeline_model_parallel_size = virtual_size;
  }
  layout.data_parallel_size = replicas;
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  mb::ExportOptions options;
  options.export_id = "turns";
  const std::size_t world = checkpoint.layout(layout).world_size;
  std::size_t needed = 0;
  bool complete = false;
  for (std::size_t rank = 0; rank < world; ++rank) {
    const mb::RankCoord coord = mb::RankCoord::of(world - 1 - rank);
    needed +=
        mb::Exporter::open(checkpoint, layout, coord, args.scratch + "/out", options).is_needed();
    const mb::ExportState state =
        export_rank(checkpoint, layout, world - 1 - rank, args.scratch + "/out", options);
    BRIDGE_CHECK(!complete);
    complete = state.complete;
  }
  BRIDGE_CHECK(complete);
  BRIDGE_CHECK(needed > 0);
}

// One rank of several processes; `more` is the rank and what it does.
BRIDGE_CASE(a_process_exports_its_rank) {
  std::istringstream words(args.more);
  std::size_t rank = 0;
  std::string what;
  words >> rank >> what;
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  mb::ExportOptions options;
  options.export_id = "several";
  const std::string target = args.scratch + "/out";
  if (what == "dies") {
    const mb::RankCoord coord = mb::RankCoord::of(rank);
    const Memory memory = loaded(checkpoint, two_by_two(), coord);
    const mb::Exporter exporter =
        mb::Exporter::open(checkpoint, two_by_two(), coord, target, options);
    std::vector<mb::Source> half = memory.sources();
    half.resize(half.size() / 2);
    exporter.write_all(half);
    _exit(7);
  }
  const mb::ExportState state = export_rank(checkpoint, two_by_two(), rank, target, options);
  BRIDGE_CHECK_EQ(state.needed, 8u);
  if (what == "last") {
    BRIDGE_CHECK(state.complete);
  }
  if (what == "waits") {
    BRIDGE_CHECK(!state.complete);
    BRIDGE_CHECK(state.finished < state.needed);
  }
}

BRIDGE_CASE(an_export_that_cannot_be) {
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  const std::string target = args.scratch + "/out";
  mb::ExportOptions options;
  const mb::ParallelLayout layout = two_by_two();
  const auto open = [&](const mb::ParallelLayout& with) {
    return mb::Exporter::open(checkpoint, with, {}, target, options);
  };
  fails(ErrorCode::argument, {"the export id `` cannot be used (8 stages of ranks take part)"},
        [&] { open(layout); });
  options.export_id = "a/b";
  fails(ErrorCode::argument, {"`a/b` cannot be used"}, [&] { open({}); });
  options.export_id = "first";
  fails(ErrorCode::export_conflict, {"exists and is not empty"},
        [&] { mb::Exporter::open(checkpoint, {}, {}, args.scratch, options); });
  fails(ErrorCode::argument, {"names no directory"},
        [&] { mb::Exporter::open(checkpoint, {}, {}, "/", options); });
  mb::ParallelLayout without = {};
  without.without_mtp = true;
  fails(ErrorCode::tensor, {"the ranks lack ", "mtp."}, [&] { open(without); });
  const mb::Exporter exporter = open(layout);
  fails(ErrorCode::export_conflict,
        {"is being made by other ranks with another `parallel sizes`", "tp_size: 1"},
        [&] { open({}); });
  options.overwrite = true;
  fails(ErrorCode::export_conflict, {"another `overwrite`: theirs is false, this rank's true"},
        [&] { open(layout); });
  // What is wrong with a source is said as for a destination.
  const mb::TensorInfo& first = exporter.tensors()[0];
  Memory memory(exporter.tensors());
  fails(ErrorCode::tensor, {"has no tensor `nothing`"},
        [&] { exporter.write("nothing", memory.data[0].data(), first.bytes, first.dtype); });
  fails(ErrorCode::argument, {"is null"},
        [&] { exporter.write(first.name, nullptr, first.bytes, first.dtype); });
  fails(ErrorCode::size, {"bytes need"},
        [&] { exporter.write(first.name, memory.data[0].data(), first.bytes - 1, first.dtype); });
  fails(ErrorCode::dtype, {"I32"},
        [&] { exporter.write(first.name, memory.data[0].data(), first.bytes, mb::Dtype::i32); });
  fails(ErrorCode::alignment, {"is not a multiple"}, [&] {
    exporter.write(first.name, reinterpret_cast<char*>(memory.data[0].data()) + 1, first.bytes,
                   first.dtype);
  });
  memory.data[0][0] = std::numeric_limits<double>::infinity();
  fails(ErrorCode::non_finite, {"of `" + first.name + "` is"},
        [&] { exporter.write(first.name, memory.data[0].data(), first.bytes, first.dtype); });
  memory.data[0][0] = 0;
  // Handing it in again is allowed after a failure, and once.
  exporter.write(first.name, memory.data[0].data(), first.bytes, first.dtype);
  fails(ErrorCode::tensor, {"`" + first.name + "` of rank 0, virtual stage 0 was handed in before"},
        [&] { exporter.write(first.name, memory.data[0].data(), first.bytes, first.dtype); });
  mb::LoadOptions cancelled;
  cancelled.cancellation = mb::Cancellation();
  cancelled.cancellation->cancel();
  const std::vector<mb::Source> rest = memory.sources();
  fails(ErrorCode::cancelled, {"cancelled after 0 of "},
        [&] { exporter.write_all(mb::Span<const mb::Source>(rest.data() + 1, 3), cancelled); });
  exporter.write_all(mb::Span<const mb::Source>(rest.data() + 1, 3));
  BRIDGE_CHECK(!std::filesystem::exists(target));
  BRIDGE_CHECK_EQ(mb::Exporter::discard(target), 1u);
  BRIDGE_CHECK_EQ(mb::Exporter::discard(target), 0u);
}

// A norm that two tensor-parallel ranks hold with different values.
BRIDGE_CASE(replicas_that_differ) {
  mb::ParallelLayout layout;
  layout.tensor_model_parallel_size = 2;
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  mb::ExportOptions options;
  options.export_id = "differ";
  for (std::size_t rank = 0; rank < 2; ++rank) {
    const mb::RankCoord coord = mb::RankCoord::of(rank);
    Memory memory = loaded(checkpoint, layout, coord);
    if (rank == 1) {
      for (std::size_t at = 0; at < memory.tensors.size(); ++at) {
        if (memory.tensors[at].name == kNorm) {
          reinterpret_cast<float*>(memory.data[at].data())[2] += 1.0f;
        }
      }
    }
    const mb::Exporter exporter =
        mb::Exporter::open(checkpoint, layout, coord, args.scratch + "/out", options);
    exporter.write_all(memory.sources());
    if (rank == 0) {
      BRIDGE_CHECK(!exporter.finish().complete);
    } else {
      fails(ErrorCode::export_conflict,
            {std::string("`") + kNorm + "` of rank 1, virtual stage 0 differs from `" + kNorm +
             "` of rank 0, virtual stage 0"},
            [&] { exporter.finish(); });
    }
  }
  BRIDGE_CHECK(!std::filesystem::exists(args.scratch + "/out"));
}

// Over a directory that is there, and with the head of the reference.
BRIDGE_CASE(what_is_there_is_replaced) {
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  mb::ParallelLayout layout;
  layout.without_mtp = true;
  mb::ExportOptions options;
  options.overwrite = true;
  options.missing = mb::Missing::copy;
  std::filesystem::create_directory(args.scratch + "/out");
  std::filesystem::copy(args.checkpoint + "/config.json", args.scratch + "/out/old.json");
  BRIDGE_CHECK(export_rank(checkpoint, layout, 0, args.scratch + "/out", options).complete);
  BRIDGE_CHECK(!std::filesystem::exists(args.scratch + "/out/old.json"));
}
