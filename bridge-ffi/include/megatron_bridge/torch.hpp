/// @file torch.hpp Fills torch tensors of a running job, and exports them. Header-only; needs
///   libtorch in the job's own project.
///
/// @code
/// namespace mb = megatron_bridge;
/// mb::Plan plan = mb::Checkpoint::open("Qwen3.5-9B").plan(layout, mb::RankCoord::of(global_rank));
/// std::map<std::string, torch::Tensor> parameters = ...;  // by Megatron-Core's local names
/// mb::load_state_dict(plan, parameters);
/// @endcode
///
/// Tensors on the CPU whose rows are contiguous are filled in place. All others (on a device, or
/// with other strides) go through staging buffers: while one is copied, the next is filled. For a
/// device the buffers are pinned and the copies run on a stream of their own.
///
/// Written with what libtorch has on every device (c10 streams, events and guards), so that a
/// project needs no CUDA headers. It was compiled and tested with libtorch 2.11.
///
/// What libtorch itself refuses is thrown as c10::Error; everything else as megatron_bridge::Error.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "megatron_bridge/megatron_bridge.hpp"

namespace megatron_bridge {

/// A job's tensors by Megatron-Core's local names. at::Tensor and torch::Tensor are one type.
using StateDict = std::map<std::string, at::Tensor>;

/// How torch tensors are loaded or exported.
struct TorchOptions {
  /// Threads, progress, cancellation, what may be left out.
  LoadOptions load = {};
  /// Bytes of a staging buffer; one that must hold a larger row (an export: tensor) is larger.
  std::size_t staging_bytes = std::size_t{64} << 20;
  /// Staging buffers a device, at least 1; with one, reading waits for each copy.
  std::size_t staging_buffers = 2;
};

/// The torch type of a Dtype.
/// @throws Error dtype for a number that is no Dtype
inline at::ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::boolean:
      return at::kBool;
    case Dtype::u8:
      return at::kByte;
    case Dtype::i8:
      return at::kChar;
    case Dtype::f8_e4m3:
      return at::kFloat8_e4m3fn;
    case Dtype::f8_e5m2:
      return at::kFloat8_e5m2;
    case Dtype::i16:
      return at::kShort;
    case Dtype::u16:
      return at::kUInt16;
    case Dtype::f16:
      return at::kHalf;
    case Dtype::bf16:
      return at::kBFloat16;
    case Dtype::i32:
      return at::kInt;
    case Dtype::u32:
      return at::kUInt32;
    case Dtype::f32:
      return at::kFloat;
    case Dtype::i64:
      return at::kLong;
    case Dtype::u64:
      return at::kUInt64;
    case Dtype::f64:
      return at::kDouble;
  }
  throw Error(ErrorCode::dtype, "there is no dtype of this number");
}

/// Details of the functions below; no part of the interface.
namespace torch_detail {

inline std::string text(at::IntArrayRef shape) {
  std::string text = "[";
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
  }
  return text + "]";
}

inline std::vector<std::int64_t> sizes(const TensorInfo& info) {
  return {info.shape.begin(), info.shape.end()};
}

inline std::size_t unsigned_size(std::int64_t size) {
  return static_cast<std::size_t>(size);
}

/// The types that values are converted to and from.
inline std::optional<Dtype> weight_dtype(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return Dtype::f16;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kFloat:
      return Dtype::f32;
    case at::kDouble:
      return Dtype::f64;
    default:
      return std::nullopt;
  }
}

/// Refuses a tensor that cannot be the one of `info`; before any byte moves.
inline Dtype check(const TensorInfo& info, const at::Tensor& tensor) {
  const std::string name = "`" + info.name + "`";
  if (!tensor.defined()) {
    throw Error(ErrorCode::argument, name + " is an undefined tensor; allocate it first");
  }
  if (tensor.layout() != at::kStrided || tensor.is_meta()) {
    throw Error(ErrorCode::argument, name + " has no dense memory (device " +
                                         tensor.device().str() +
                                         "); allocate it on a device first, `empty_like` does");
  }
  if (tensor.sizes() != at::IntArrayRef(sizes(info))) {
    throw Error(ErrorCode::size, name + " has shape " + text(tensor.sizes()) +
                                     ", but this rank's part of it is " + text(sizes(info)) +
                                     "; were the layout and the rank those of the job?");
  }
  const std::optional<Dtype> dtype = weight_dtype(tensor.scalar_type());
  if (!dtype) {
    throw Error(ErrorCode::dtype, name + " is of dtype " + c10::toString(tensor.scalar_type()) +
                                      ", but weights are Half, BFloat16, Float or Double");
  }
  return *dtype;
}

/// Elements of a row: of one index of the first axis.
inline std::int64_t row_numel(const at::Tensor& tensor) {
  return tensor.dim() == 0 || tensor.size(0) == 0 ? 1 : tensor.numel() / tensor.size(0);
}

/// The stride of rows in bytes, 0 where they touch, of memory that the library can use as it is;
/// nothing for any other.
inline std::optional<std::size_t> row_stride_bytes(const at::Tensor& tensor) {
  if (!tensor.device().is_cpu() || tensor.is_neg()) {
    return std::nullopt;
  }
  if (tensor.is_contiguous()) {
    return 0;
  }
  std::int64_t inner = 1;
  for (std::int64_t axis = tensor.dim() - 1; axis > 0; --axis) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != inner) {
      return std::nullopt;
    }
    inner *= tensor.size(axis);
  }
  if (tensor.stride(0) < inner) {
    return std::nullopt;
  }
  return unsigned_size(tensor.stride(0)) * tensor.element_size();
}

/// Bytes from the first element to the end of the last one of a tensor that row_stride_bytes takes.
inline std::size_t extent_bytes(const at::Tensor& tensor, std::size_t stride_bytes) {
  if (stride_bytes == 0) {
    return tensor.nbytes();
  }
  return (unsigned_size(tensor.size(0)) - 1) * stride_bytes +
         unsigned_size(row_numel(tensor)) * tensor.element_size();
}

/// Options of one of several calls, whose progress is that of all of them.
inline LoadOptions part_of(const LoadOptions& options, std::uint64_t bytes_before,
                           std::uint64_t bytes_total) {
  LoadOptions part = options;
  part.partial = true;
  if (options.progress) {
    part.progress = [progress = options.progress, bytes_before, bytes_total](const Progress& now) {
      progress({bytes_before + now.bytes_done, bytes_total});
    };
  }
  return part;
}

inline void add(LoadReport& report, const LoadReport& part) {
  report.tensors += part.tensors;
  report.bytes += part.bytes;
  report.rounded += part.rounded;
  report.seconds += part.seconds;
}

/// One tensor that goes through staging buffers.
struct Staged {
  const TensorInfo* info;
  at::Tensor tensor;
  Dtype dtype;

  std::size_t row_bytes() const { return unsigned_size(row_numel(tensor)) * tensor.element_size(); }
  std::size_t rows() const { return tensor.dim() == 0 ? 1 : unsigned_size(tensor.size(0)); }
};

/// Rows of one tensor, at a place in a buffer.
struct Piece {
  Staged* staged;
  std::size_t first_row;
  std::size_t num_rows;
  std::size_t offset;

  std::size_t bytes() const { return num_rows * staged->row_bytes(); }
};

/// Cuts tensors into buffers of at most `capacity` bytes, each a list of pieces.
inline std::vector<std::vector<Piece>> cut(std::vector<Staged>& tensors, std::size_t capacity) {
  // Every dtype is aligned to this, and the library reads fastest into whole lines.
  constexpr std::size_t kAlignment = 64;
  std::vector<std::vector<Piece>> buffers;
  std::size_t used = capacity;
  for (Staged& staged : tensors) {
    const std::size_t row_bytes = staged.row_bytes();
    for (std::size_t row = 0; row < staged.rows() && row_bytes > 0;) {
      const std::size_t fitting = used < capacity ? (capacity - used) / row_bytes : 0;
      if (fitting == 0) {
        // The first row of a fresh buffer always fits: the capacity is at least that of a row.
        buffers.emplace_back();
        used = 0;
        continue;
      }
      const std::size_t num_rows = std::min(fitting, staged.rows() - row);
      buffers.back().push_back({&staged, row, num_rows, used});
      row += num_rows;
      used = (used + num_rows * row_bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
  }
  return buffers;
}

/// The stream on which a device copies staging buffers; nothing for the CPU.
inline std::optional<c10::Stream> copy_stream(at::Device device) {
  if (device.is_cpu()) {
    return std::nullopt;
  }
  const c10::impl::VirtualGuardImpl guard(device.type());
  const c10::Stream stream = guard.getStreamFromGlobalPool(device);
  // What the job has queued for these tensors, a fill with zeros for example, comes first.
  c10::Event queued(device.type());
  queued.record(guard.getStream(device));
  queued.block(stream);
  return stream;
}

/// A staging buffer and, on a device, the event behind the last copy out of it.
class StagingBuffer {
 public:
  StagingBuffer(std::size_t bytes, const std::optional<c10::Stream>& stream)
      : bytes_(at::empty({static_cast<std::int64_t>(bytes)},
                         at::TensorOptions().dtype(at::kByte).pinned_memory(stream.has_value()))),
        stream_(stream) {
    if (stream_) {
      copied_.emplace(stream_->device_type());
    }
  }
  StagingBuffer(StagingBuffer&&) = default;
  StagingBuffer& operator=(StagingBuffer&&) = delete;
  /// Also when an error unwinds: the memory must outlive the copies.
  ~StagingBuffer() {
    try {
      wait();
    } catch (...) {
      // The device is lost; whoever uses its tensors next hears of it.
    }
  }

  /// Until the buffer may be written again.
  void wait() {
    if (copied_ && copied_->was_marked_for_recording()) {
      copied_->synchronize();
    }
  }

  void* at_offset(std::size_t offset) {
    return static_cast<std::uint8_t*>(bytes_.data_ptr()) + offset;
  }

  /// Copies pieces into their tensors; on a device this only queues it.
  void copy_out(const std::vector<Piece>& pieces) {
    const c10::OptionalStreamGuard on_stream(stream_);
    for (const Piece& piece : pieces) {
      at::Tensor target = piece.staged->tensor;
      if (target.dim() > 0) {
        target = target.narrow(0, static_cast<std::int64_t>(piece.first_row),
                               static_cast<std::int64_t>(piece.num_rows));
      }
      const at::Tensor staged = bytes_.narrow(0, static_cast<std::int64_t>(piece.offset),
                                              static_cast<std::int64_t>(piece.bytes()));
      target.copy_(staged.view(target.scalar_type()).view(target.sizes()), stream_.has_value());
    }
    if (copied_) {
      copied_->record(*stream_);
    }
  }

 private:
  at::Tensor bytes_;
  std::optional<c10::Stream> stream_;
  std::optional<c10::Event> copied_;
};

/// Where a piece of a staging buffer is loaded from.
inline Destination destination(const Piece& piece, StagingBuffer& buffer) {
  Destination destination;
  destination.name = piece.staged->info->name;
  destination.data = buffer.at_offset(piece.offset);
  destination.bytes = piece.bytes();
  destination.dtype = piece.staged->dtype;
  if (piece.num_rows < piece.staged->rows()) {
    destination.first_row = piece.first_row;
    destination.num_rows = piece.num_rows;
  }
  return destination;
}

/// Loads tensors of one device through staging buffers.
inline void load_staged(const Plan& plan, std::vector<Staged>& tensors, const TorchOptions& options,
                        std::uint64_t bytes_total, LoadReport& report) {
  std::size_t capacity = options.staging_bytes;
  for (const Staged& staged : tensors) {
    capacity = std::max(capacity, staged.row_bytes());
  }
  const std::vector<std::vector<Piece>> contents = cut(tensors, capacity);
  if (contents.size() == 1) {
    capacity = contents[0].back().offset + contents[0].back().bytes();
  }
  const std::optional<c10::Stream> stream = copy_stream(tensors.front().tensor.device());
  std::vector<StagingBuffer> buffers;
  const std::size_t num_buffers =
      std::min(std::max<std::size_t>(options.staging_buffers, 1), contents.size());
  buffers.reserve(num_buffers);
  for (std::size_t turn = 0; turn < contents.size(); ++turn) {
    if (buffers.size() < num_buffers) {
      buffers.emplace_back(capacity, stream);
    }
    StagingBuffer& buffer = buffers[turn % num_buffers];
    buffer.wait();
    // A tensor that began in the buffer before is loaded by a call of its own, so that the report
    // counts it once.
    std::vector<Destination> continued;
    std::vector<Destination> begun;
    for (const Piece& piece : contents[turn]) {
      (piece.first_row > 0 ? continued : begun).push_back(destination(piece, buffer));
    }
    if (!continued.empty()) {
      const LoadReport part =
          plan.load_all(continued, part_of(options.load, report.bytes, bytes_total));
      report.bytes += part.bytes;
      report.seconds += part.seconds;
    }
    if (!begun.empty()) {
      add(report, plan.load_all(begun, part_of(options.load, report.bytes, bytes_total)));
    }
    buffer.copy_out(contents[turn]);
  }
  for (StagingBuffer& buffer : buffers) {
    buffer.wait();
  }
}

inline bool is_extra_state(const std::string& name) {
  static const std::string kEnd = "_extra_state";
  return name.size() >= kEnd.size() &&
         name.compare(name.size() - kEnd.size(), kEnd.size(), kEnd) == 0;
}

/// The tensors that are a parameter, each with what the rank holds under its name.
template <class Find>
std::vector<Staged> checked(const StateDict& state_dict, const Find& find) {
  std::vector<Staged> tensors;
  for (const auto& [name, tensor] : state_dict) {
    if (!is_extra_state(name)) {
      const TensorInfo& info = find(name);
      tensors.push_back({&info, tensor, check(info, tensor)});
    }
  }
  return tensors;
}

/// Refuses to leave a tensor of the rank as it is.
inline void refuse_missing(const Plan& plan, const StateDict& state_dict) {
  std::size_t missing = 0;
  std::string names;
  for (const TensorInfo& info : plan) {
    if (state_dict.find(info.name) == state_dict.end() && ++missing <= 10) {
      names += (missing == 1 ? "`" : ", `") + info.name + "`";
    }
  }
  if (missing > 0) {
    throw Error(ErrorCode::tensor, std::to_string(missing) +
                                       " tensors of this rank are not in the state dict: " + names +
                                       (missing > 10 ? ", ..." : "") +
                                       "; add them, plan without them, or set `partial`");
  }
}

/// Refuses contiguous tensors that share memory: the values of one would be lost.
inline void refuse_overlaps(const std::vector<Staged>& tensors) {
  std::map<std::string, std::map<std::uintptr_t, const Staged*>> by_device;
  for (const Staged& staged : tensors) {
    if (staged.tensor.numel() == 0 || !staged.tensor.is_contiguous()) {
      continue;
    }
    auto& starts = by_device[staged.tensor.device().str()];
    const auto start = reinterpret_cast<std::uintptr_t>(staged.tensor.data_ptr());
    const auto [place, fresh] = starts.emplace(start, &staged);
    const Staged* other = fresh ? nullptr : place->second;
    if (fresh && place != starts.begin()) {
      const auto before = std::prev(place);
      other = before->first + before->second->tensor.nbytes() > start ? before->second : nullptr;
    }
    if (fresh && other == nullptr && std::next(place) != starts.end()) {
      const auto after = std::next(place);
      other = start + staged.tensor.nbytes() > after->first ? after->second : nullptr;
    }
    if (other != nullptr) {
      throw Error(ErrorCode::overlap, "`" + staged.info->name + "` and `" + other->info->name +
                                          "` share memory; leave one of them out with `partial`");
    }
  }
}

}  // namespace torch_detail

/// New tensors for everything that a rank holds, in the plan's dtypes and with undefined content.
///
/// @param options the device, for example; a dtype here replaces the plan's
inline StateDict empty_state_dict(const Plan& plan, const at::TensorOptions& options = {}) {
  StateDict state_dict;
  for (const TensorInfo& info : plan) {
    const at::TensorOptions its =
        options.has_dtype() ? options : options.dtype(scalar_type(info.dtype));
    state_dict.emplace(info.name, at::empty(torch_detail::sizes(info), its));
  }
  return state_dict;
}

/// Fills all tensors of a rank in place, in parallel.
///
/// Values are cast to the tensors' own dtypes. Entries whose name ends in `_extra_state`, which
/// Transformer Engine adds, are no parameters and left alone.
///
/// @return as Plan::load_all; `seconds` is the time of reading
/// @throws Error tensor for an entry that the rank does not hold, and with the tensors that have no
///   entry unless options.load.partial; size for another shape; dtype for a tensor that is no
///   Half, BFloat16, Float or Double; argument for one without memory; overlap for two that share
///   theirs: all before any byte is touched. Then as Plan::load_all.
inline LoadReport load_state_dict(const Plan& plan, const StateDict& state_dict,
                                  const TorchOptions& options = {}) {
  const at::NoGradGuard no_grad;
  std::vector<torch_detail::Staged> tensors = torch_detail::checked(
      state_dict, [&](const std::string& name) -> const TensorInfo& { return plan.at(name); });
  if (!options.load.partial) {
    torch_detail::refuse_missing(plan, state_dict);
  }
  torch_detail::refuse_overlaps(tensors);

  std::uint64_t bytes_total = 0;
  std::vector<Destination> in_place;
  std::map<std::string, std::vector<torch_detail::Staged>> staged;  // by device
  for (torch_detail::Staged& entry : tensors) {
    bytes_total += entry.tensor.nbytes();
    if (const std::optional<std::size_t> stride = torch_detail::row_stride_bytes(entry.tensor)) {
      Destination destination;
      destination.name = entry.info->name;
      destination.data = entry.tensor.data_ptr();
      destination.bytes = torch_detail::extent_bytes(entry.tensor, *stride);
      destination.dtype = entry.dtype;
      destination.row_stride_bytes = *stride;
      in_place.push_back(std::move(destination));
    } else {
      staged[entry.tensor.device().str()].push_back(entry);
    }
  }

  LoadReport report;
  if (!in_place.empty()) {
    report = plan.load_all(in_place, torch_detail::part_of(options.load, 0, bytes_total));
  }
  for (auto& [device, of_device] : staged) {
    torch_detail::load_staged(plan, of_device, options, bytes_total, report);
  }
  for (const torch_detail::Staged& entry : tensors) {
    // As an in-place operation of torch does, for graphs that have saved the old values.
    if (!entry.tensor.is_inference()) {
      entry.tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
  return report;
}

/// Fills one tensor.
/// @throws Error as load_state_dict
inline LoadReport load_tensor(const Plan& plan, const std::string& name, const at::Tensor& tensor,
                              const TorchOptions& options = {}) {
  TorchOptions one = options;
  one.load.partial = true;
  return load_state_dict(plan, {{name, tensor}}, one);
}

/// Hands a job's tensors to an export. Several calls may share them out.
///
/// Tensors on the CPU whose rows are contiguous are read in place; all others are copied to the CPU
/// first, TorchOptions::staging_bytes at a time, or one larger tensor. Entries whose name ends in
/// `_extra_state` are left out.
///
/// @throws Error tensor for an entry that the rank does not hold; size, dtype or argument, all
///   before any byte is read. Then as Exporter::write_all.
inline LoadReport write_state_dict(const Exporter& exporter, const StateDict& state_dict,
                                   const TorchOptions& options = {}) {
  const at::NoGradGuard no_grad;
  std::map<std::string, const TensorInfo*> wanted;
  for (const TensorInfo& info : exporter.tensors()) {
    wanted.emplace(info.name, &info);
  }
  const std::vector<torch_detail::Staged> tensors =
      torch_detail::checked(state_dict, [&](const std::string& name) -> const TensorInfo& {
        const auto found = wanted.find(name);
        if (found == wanted.end()) {
          throw Error(ErrorCode::tensor, "this rank has no tensor `" + name + "` to export");
        }
        return *found->second;
      });

  std::uint64_t bytes_total = 0;
  for (const torch_detail::Staged& entry : tensors) {
    bytes_total += entry.tensor.nbytes();
  }
  LoadReport report;
  std::vector<Source> sources;
  std::vector<at::Tensor> copies;
  std::size_t copied = 0;
  const auto write = [&] {
    if (!sources.empty()) {
      torch_detail::add(
          report, exporter.write_all(
                      sources, torch_detail::part_of(options.load, report.bytes, bytes_total)));
    }
    sources.clear();
    copies.clear();
    copied = 0;
  };
  for (const torch_detail::Staged& entry : tensors) {
    at::Tensor tensor = entry.tensor.detach();
    std::optional<std::size_t> stride = torch_detail::row_stride_bytes(tensor);
    if (!stride) {
      if (copied > 0 && copied + tensor.nbytes() > options.staging_bytes) {
        write();
      }
      tensor = tensor.to(at::kCPU).contiguous().resolve_neg();
      stride = 0;
      copied += tensor.nbytes();
      copies.push_back(tensor);
    }
    Source source;
    source.name = entry.info->name;
    source.data = tensor.data_ptr();
    source.bytes = torch_detail::extent_bytes(tensor, *stride);
    source.dtype = entry.dtype;
    source.row_stride_bytes = *stride;
    sources.push_back(std::move(source));
  }
  write();
  return report;
}

}  // namespace megatron_bridge
