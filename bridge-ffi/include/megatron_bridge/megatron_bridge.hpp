/// @file megatron_bridge.hpp C++17 interface of the bridge between Hugging Face checkpoints and the
///   tensors of a Megatron-Core rank.
///
/// A checkpoint is opened, a layout and a rank are named, and the rank's own memory is filled in
/// place, in parallel, without a second copy of the model on the disk or in memory:
/// @code
/// namespace mb = megatron_bridge;
/// mb::ParallelLayout layout;
/// layout.tensor_model_parallel_size = 2;
/// mb::Checkpoint checkpoint = mb::Checkpoint::open("Qwen3.5-9B");
/// mb::Plan plan = checkpoint.plan(layout, mb::RankCoord::of(global_rank));
/// std::vector<mb::Destination> destinations;
/// for (const mb::TensorInfo& tensor : plan) {
///   void* data = parameter_memory(tensor.name);
///   destinations.push_back({tensor.name, data, tensor.bytes, tensor.dtype});
/// }
/// plan.load_all(destinations);
/// @endcode
///
/// Rules that hold everywhere:
/// - Failures are thrown as megatron_bridge::Error, whose text holds the whole chain of causes.
///   What was given to a call is checked before the first byte moves.
/// - Handles (Checkpoint, Plan, Provider, Exporter, Cancellation) are cheap to copy; copies share
///   one object, which lives as long as the last of them. Their const functions may be called from
///   several threads at once. There is no global state.
/// - A handle that was moved from may only be destroyed or assigned to.
/// - Elements are little-endian, tensors row-major. Names of tensors are Megatron-Core's local
///   names: layers and experts count from 0 on each rank and virtual stage, and there is no
///   `module.` in front.
///
/// megatron_bridge.h has the same for C.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "megatron_bridge/provider.hpp"

namespace megatron_bridge {

/// The library's version, `0.1.0` for example.
BRIDGE_CPP_API std::string version();

/// The type of a tensor's elements. Weights are f16, bf16, f32 or f64; the others are refused with
/// ErrorCode::dtype wherever values would be converted. Numbers are those of `bridge_dtype`.
enum class Dtype : std::int32_t {
  boolean = 1,
  u8 = 2,
  i8 = 3,
  f8_e4m3 = 4,
  f8_e5m2 = 5,
  i16 = 6,
  u16 = 7,
  f16 = 8,
  bf16 = 9,
  i32 = 10,
  u32 = 11,
  f32 = 12,
  i64 = 13,
  u64 = 14,
  f64 = 15,
};

/// Bytes of an element; 0 for a number that is no Dtype.
BRIDGE_CPP_API std::size_t size_bytes(Dtype dtype) noexcept;

/// torch's word: `bfloat16`, `float32`, `float8_e4m3fn`, ...; empty for a number that is no Dtype.
BRIDGE_CPP_API std::string to_string(Dtype dtype);

/// Kinds of failure. Numbers are those of `bridge_status`.
enum class ErrorCode : std::int32_t {
  /// An argument is null, no UTF-8, or out of its range.
  argument = 1,
  /// The system refused: a file is missing or not readable, the disk is full.
  io = 2,
  /// The files are damaged, cut short, not of a supported model, or do not fit their config.
  checkpoint = 3,
  /// The layout does not fit the model, or there is no such rank or virtual stage.
  layout = 4,
  /// There is no tensor of this name, one that is needed is not named, or one is handed in twice.
  tensor = 5,
  /// A buffer or a range of rows has not the size of the tensor.
  size = 6,
  /// Values cannot be converted to or from this dtype.
  dtype = 7,
  /// A pointer or stride is not a multiple of the element's size.
  alignment = 8,
  /// Two destinations share memory.
  overlap = 9,
  /// A value is infinite or not a number, and that was not allowed.
  non_finite = 10,
  /// The work was cancelled.
  cancelled = 11,
  /// An export cannot go on: the target is taken, or the ranks do not agree.
  export_conflict = 12,
  /// A defect of the library; please report the text.
  internal = 13,
};

/// What the library throws. what() says what was wrong, with names and numbers, then each cause on
/// a line of its own behind `caused by: `.
class BRIDGE_CPP_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message);
  Error(const Error&) noexcept;
  Error& operator=(const Error&) noexcept;
  ~Error() override;

  /// The kind of failure.
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

/// A view of objects in a row: of a pointer and a size, an array, a std::vector, a std::array or a
/// std::span.
template <class T>
class Span {
 public:
  constexpr Span() noexcept = default;
  constexpr Span(T* data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t N>
  constexpr Span(T (&array)[N]) noexcept : data_(array), size_(N) {}
  template <class Container, class = std::enable_if_t<std::is_convertible_v<
                                 decltype(std::declval<Container&>().data()), T*>>>
  constexpr Span(Container&& container) noexcept
      : data_(container.data()), size_(container.size()) {}

  constexpr T* data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T* begin() const noexcept { return data_; }
  constexpr T* end() const noexcept { return data_ + size_; }
  constexpr T& operator[](std::size_t index) const noexcept { return data_[index]; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

/// How a model is laid out over ranks, in Megatron-Core's words; one rank by default. Sizes count
/// ranks.
struct ParallelLayout {
  /// Ranks over which matrices are cut.
  std::size_t tensor_model_parallel_size = 1;
  /// Ranks over which layers are divided.
  std::size_t pipeline_model_parallel_size = 1;
  /// Virtual stages a pipeline rank; without it none, or what pipeline_model_parallel_layout says.
  std::optional<std::size_t> virtual_pipeline_model_parallel_size = std::nullopt;
  /// It changes no parameter, only which ranks hold the same ones.
  std::size_t context_parallel_size = 1;
  /// Ranks over which experts are divided.
  std::size_t expert_model_parallel_size = 1;
  /// Ranks over which the matrices of an expert are cut. 1 as in Megatron Bridge's scripts;
  /// Megatron-Core's own default is the tensor-parallel size.
  std::size_t expert_tensor_parallel_size = 1;
  /// Without it the smallest that the other sizes allow.
  std::optional<std::size_t> data_parallel_size = std::nullopt;
  /// All ranks. Not together with data_parallel_size.
  std::optional<std::size_t> world_size = std::nullopt;
  /// Every stage written out, as `Et*3|(tt|)*29,m|L`: embedding, decoder layers, MTP head, loss.
  /// Empty: an even split.
  std::string pipeline_model_parallel_layout = {};
  /// Decoder layers of the first pipeline rank; the others share the rest.
  std::optional<std::size_t> num_layers_in_first_pipeline_stage = std::nullopt;
  /// Decoder layers of the last pipeline rank; the others share the rest.
  std::optional<std::size_t> num_layers_in_last_pipeline_stage = std::nullopt;
  /// The embedding counts as a layer of the first stage.
  bool account_for_embedding_in_pipeline_split = false;
  /// The output layer counts as a layer of the last stage.
  bool account_for_loss_in_pipeline_split = false;
  /// The vocabulary is padded with zeros to a multiple of this times the tensor-parallel size;
  /// without it not at all.
  std::optional<std::size_t> make_vocab_size_divisible_by = std::nullopt;
  /// Experts are named one by one, as Megatron-Core does without grouped GEMM.
  bool sequential_experts = false;
  /// The multi-token-prediction head is left out.
  bool without_mtp = false;
  /// The dtype that every parameter is planned in; without it each keeps the checkpoint's.
  std::optional<Dtype> params_dtype = std::nullopt;
};

/// Which rank, and which of its virtual stages.
struct RankCoord {
  /// Tensor-parallel rank.
  std::size_t tp_rank = 0;
  /// Pipeline rank.
  std::size_t pp_rank = 0;
  /// Expert-parallel rank.
  std::size_t ep_rank = 0;
  /// Expert-tensor-parallel rank.
  std::size_t etp_rank = 0;
  /// Virtual stage of the pipeline rank: each model chunk of a rank has a plan of its own. 0
  /// without virtual stages.
  std::size_t vp_stage = 0;
  /// The rank in Megatron's order tp-cp-ep-dp-pp; the four coordinates above are not looked at
  /// then. Without it they name the rank, the lowest one that has them.
  std::optional<std::size_t> global_rank = std::nullopt;

  /// The rank of a global number.
  static RankCoord of(std::size_t global_rank, std::size_t vp_stage = 0) {
    RankCoord coord;
    coord.global_rank = global_rank;
    coord.vp_stage = vp_stage;
    return coord;
  }
};

/// What a layout comes to for a model.
struct LayoutInfo {
  /// All ranks.
  std::size_t world_size = 0;
  /// Replicas of the dense parameters.
  std::size_t data_parallel_size = 0;
  /// Replicas of the experts.
  std::size_t expert_data_parallel_size = 0;
  /// Model chunks a pipeline rank; 1 without virtual stages.
  std::size_t virtual_pipeline_model_parallel_size = 0;
  /// Rows of the vocabulary over all tensor-parallel ranks, padding included.
  std::size_t padded_vocab_size = 0;
  /// The split of the pipeline as a layout string.
  std::string pipeline_model_parallel_layout = {};
};

/// Coordinates of a rank in both of Megatron's grids, and the virtual stage.
struct RankPlace {
  std::size_t global_rank = 0;
  std::size_t tp_rank = 0;
  std::size_t cp_rank = 0;
  std::size_t dp_rank = 0;
  std::size_t pp_rank = 0;
  std::size_t etp_rank = 0;
  std::size_t ep_rank = 0;
  std::size_t edp_rank = 0;
  std::size_t vp_stage = 0;
};

/// One tensor of a rank.
struct TensorInfo {
  /// Its local Megatron name.
  std::string name = {};
  /// What the layout asked for, else the checkpoint's.
  Dtype dtype = Dtype::f32;
  /// Elements along each axis of the rank's part; empty for a scalar.
  std::vector<std::size_t> shape = {};
  /// Bytes of the rank's part in `dtype`.
  std::size_t bytes = 0;
};

/// Memory of the caller that a tensor, or a range of its rows, is to stand in.
///
/// A row is one index of the first axis: a tensor of shape [out, in] has `out` rows of `in`
/// elements, one of shape [n] has n rows of one element. Each row is contiguous; the rows stand
/// `row_stride_bytes` apart.
struct Destination {
  /// The tensor's local Megatron name.
  std::string name = {};
  /// The first byte; a multiple of the element's size. Nothing outside the rows is touched. May be
  /// null where there are no rows.
  void* data = nullptr;
  /// Bytes that are the caller's from `data` on: exactly those of the rows where they touch, else
  /// at least up to the end of the last row.
  std::size_t bytes = 0;
  /// What values are cast to on the way (to nearest, ties to even).
  Dtype dtype = Dtype::f32;
  /// From the beginning of a row to that of the next, a multiple of the element's size; 0: the rows
  /// touch.
  std::size_t row_stride_bytes = 0;
  /// The first row of the tensor that is wanted.
  std::size_t first_row = 0;
  /// How many rows are wanted; without it all from first_row on.
  std::optional<std::size_t> num_rows = std::nullopt;
};

/// Memory of the caller that holds a whole tensor; as Destination.
struct Source {
  /// The tensor's local Megatron name.
  std::string name = {};
  /// The first byte; a multiple of the element's size.
  const void* data = nullptr;
  /// Bytes that may be read from `data` on.
  std::size_t bytes = 0;
  /// What the values are; they are cast to the reference's dtype on the way.
  Dtype dtype = Dtype::f32;
  /// From the beginning of a row to that of the next, a multiple of the element's size; 0: the rows
  /// touch.
  std::size_t row_stride_bytes = 0;
};

/// Stops work that runs in another thread. Copies share one state; one may be given to several
/// calls.
class BRIDGE_CPP_API Cancellation {
 public:
  Cancellation();
  Cancellation(const Cancellation&);
  Cancellation(Cancellation&&) noexcept;
  Cancellation& operator=(const Cancellation&);
  Cancellation& operator=(Cancellation&&) noexcept;
  ~Cancellation();

  /// Asks the calls that this was given to, and later ones, to stop with ErrorCode::cancelled.
  /// Callable from any thread.
  void cancel() const noexcept;
  /// Whether that was asked for.
  bool is_cancelled() const noexcept;

 private:
  friend struct Internals;
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

/// How far a call is.
struct Progress {
  /// Bytes of destinations that are filled (of sources that are written, for an export).
  std::uint64_t bytes_done = 0;
  /// Bytes of all of them.
  std::uint64_t bytes_total = 0;
};

/// How tensors are loaded or written.
struct LoadOptions {
  /// Threads; 0: one a core. They end with the call. Beside the tensors themselves a call needs at
  /// most 2 MiB a thread.
  std::size_t threads = 0;
  /// Called in the thread that made the call, at most every 50 ms, and once at the end. What it
  /// throws stops the work and comes out of the call unchanged, once all threads have stopped.
  std::function<void(const Progress&)> progress = {};
  /// Stops the call from elsewhere.
  std::optional<Cancellation> cancellation = std::nullopt;
  /// Infinities and NaN are carried like any other value instead of being refused.
  bool allow_non_finite = false;
  /// Tensors of the plan may be left out; without it that is ErrorCode::tensor.
  bool partial = false;
};

/// What a load did.
struct LoadReport {
  /// Destinations that were filled.
  std::size_t tensors = 0;
  /// Bytes that were written to them.
  std::uint64_t bytes = 0;
  /// Destinations some of whose values were rounded: a cast to a narrower dtype, or a norm that
  /// Megatron keeps minus one.
  std::size_t rounded = 0;
  /// Time it took.
  double seconds = 0.0;
};

/// What one virtual stage of one rank holds, as a list, and how it is made of the checkpoint.
///
/// It keeps what it needs of its Checkpoint.
class BRIDGE_CPP_API Plan {
 public:
  Plan(const Plan&);
  Plan(Plan&&) noexcept;
  Plan& operator=(const Plan&);
  Plan& operator=(Plan&&) noexcept;
  ~Plan();

  /// The tensors, in Megatron's order of the model. The list lives as long as the plan.
  const std::vector<TensorInfo>& tensors() const noexcept;
  std::size_t size() const noexcept { return tensors().size(); }
  bool empty() const noexcept { return tensors().empty(); }
  const TensorInfo& operator[](std::size_t index) const noexcept { return tensors()[index]; }
  std::vector<TensorInfo>::const_iterator begin() const noexcept { return tensors().begin(); }
  std::vector<TensorInfo>::const_iterator end() const noexcept { return tensors().end(); }
  /// The tensor of a name; null when the rank holds none.
  const TensorInfo* find(const std::string& name) const noexcept;
  /// The tensor of a name.
  /// @throws Error ErrorCode::tensor when the rank holds none; the nearest name is in the text
  const TensorInfo& at(const std::string& name) const;
  /// Bytes of all tensors in their own dtypes.
  std::uint64_t bytes() const noexcept;

  /// The rank that it was made for.
  const RankPlace& place() const noexcept;

  /// Fills one tensor in the calling thread.
  ///
  /// @param name its local Megatron name
  /// @param data `bytes` bytes of the caller's, aligned for `dtype`; row-major, contiguous
  /// @param bytes elements of the tensor times bytes of `dtype`
  /// @param dtype values are cast to it on the way
  /// @throws Error argument (null), tensor, size, dtype or alignment before any byte is touched;
  ///   io, checkpoint or non_finite while reading, after which the content of `data` is undefined
  void load(const std::string& name, void* data, std::size_t bytes, Dtype dtype) const;

  /// Fills one tensor, or a range of its rows, in the calling thread.
  void load(const Destination& destination) const;

  /// Fills many tensors in parallel. Where dtypes agree, bytes are read straight into their
  /// destination.
  ///
  /// @param destinations a tensor may have several, no two may share memory, and every tensor of
  ///   the plan has one unless options.partial
  /// @throws Error as load(); also overlap, tensor with the tensors that have no destination, and
  ///   cancelled. What options.progress throws.
  LoadReport load_all(Span<const Destination> destinations, const LoadOptions& options = {}) const;

 private:
  friend struct Internals;
  struct Impl;
  explicit Plan(std::shared_ptr<const Impl> impl) noexcept;
  std::shared_ptr<const Impl> impl_;
};

/// How a checkpoint is opened.
struct OpenOptions {
  /// For a `torch_dist` directory: the Hugging Face directory (or a config file) of the model,
  /// which says what the tensors are. Empty for a Hugging Face directory.
  std::string reference = {};
  /// Takes a `torch_dist` directory whose run_config.yaml contradicts the reference, or that holds
  /// tensors that the reference does not know.
  bool not_strict = false;
};

/// An opened checkpoint directory; its headers are read and checked, its tensors are read when they
/// are loaded.
class BRIDGE_CPP_API Checkpoint {
 public:
  /// Opens a Hugging Face directory (config.json and safetensors files), or a `torch_dist`
  /// directory: that of an iteration, or of a run, whose newest iteration is read then.
  ///
  /// @throws Error io when a file is missing; checkpoint when the model is not supported, a header
  ///   or index is wrong, or a file is cut short; argument when a `torch_dist` directory comes
  ///   without a reference
  static Checkpoint open(const std::string& path, const OpenOptions& options = {});

  Checkpoint(const Checkpoint&);
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(const Checkpoint&);
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  /// All fields of the model in Megatron's names.
  Provider provider() const;

  /// Checks a layout against the model and says what it comes to.
  /// @throws Error layout with everything that does not fit, by parameter and numbers
  LayoutInfo layout(const ParallelLayout& layout) const;

  /// Plans one virtual stage of a rank. No tensor is read.
  ///
  /// @throws Error layout when the layout does not fit the model or there is no such rank;
  ///   checkpoint when the tensors of the checkpoint are not those of its config
  Plan plan(const ParallelLayout& layout = {}, const RankCoord& rank = {}) const;

 private:
  friend struct Internals;
  struct Impl;
  explicit Checkpoint(std::shared_ptr<const Impl> impl) noexcept;
  std::shared_ptr<const Impl> impl_;
};

/// What happens to tensors of the reference that no rank has (an MTP head that was left out).
enum class Missing : std::int32_t {
  /// They are an error.
  refuse = 0,
  /// They are copied from the reference.
  copy = 1,
};

/// How a directory is made. All ranks of an export give the same options.
struct ExportOptions {
  /// Names this export among all exports to the same target: equal on all its ranks, and another
  /// one for the next try; letters, digits, `-` and `_`. Something that the ranks broadcast, for
  /// example the iteration and a random number. May be empty where one rank is enough.
  std::string export_id = {};
  /// A directory at the target is replaced, in one step.
  bool overwrite = false;
  /// Tensors of the reference that no rank has.
  Missing missing = Missing::refuse;
};

/// What stands of an export.
struct ExportState {
  /// The directory stands at the target, complete.
  bool complete = false;
  /// Stages of ranks that have finished.
  std::size_t finished = 0;
  /// Stages of ranks that are needed.
  std::size_t needed = 0;
};

/// One rank's part in making a Hugging Face directory.
///
/// Each rank hands in its tensors; the last one to finish leaves the directory at its target. What
/// is made stands hidden beside the target (`.NAME.ID.export`) until then: preallocated files, into
/// which every rank writes ranges of its own, from several processes and hosts on one shared file
/// system. Parameters that several ranks hold are written by the first of them; the others are
/// compared with it. A process that dies leaves the target as it was.
/// @code
/// mb::RankCoord coord = mb::RankCoord::of(rank);
/// mb::Exporter exporter = mb::Exporter::open(reference, layout, coord, "out", {id});
/// exporter.write_all(sources);
/// bool complete = exporter.finish().complete;  // true once all ranks are there
/// @endcode
class BRIDGE_CPP_API Exporter {
 public:
  /// Joins an export as one virtual stage of one rank; the first to come makes the directory.
  ///
  /// The files, dtypes, expert layout, tokenizer and configs are those of `reference`, a Hugging
  /// Face checkpoint with weights. Name the rank by its global rank where the layout has replicas.
  ///
  /// @param target the directory to make
  /// @throws Error export_conflict when the target is taken, or the ranks that came before have
  ///   another layout, reference or other options; tensor when tensors of the reference are
  ///   missing; io, also when the disk has not enough room
  static Exporter open(const Checkpoint& reference, const ParallelLayout& layout,
                       const RankCoord& rank, const std::string& target,
                       const ExportOptions& options = {});

  /// Removes what unfinished exports to `target` left beside it, and says how many there were;
  /// those that still run are taken away too.
  /// @throws Error io
  static std::size_t discard(const std::string& target);

  Exporter(const Exporter&);
  Exporter(Exporter&&) noexcept;
  Exporter& operator=(const Exporter&);
  Exporter& operator=(Exporter&&) noexcept;
  /// An exporter that has not finished leaves its export unfinished: nothing appears at the target.
  ~Exporter();

  /// What the rank is to hand in.
  const std::vector<TensorInfo>& tensors() const noexcept;

  /// The rank.
  const RankPlace& place() const noexcept;

  /// Whether the rank is needed: false where a lower rank has the same parameters (data and context
  /// parallelism). What such a rank hands in is checked and dropped.
  bool is_needed() const noexcept;

  /// Hands in one tensor, which is read before the call returns.
  ///
  /// @throws Error argument (null), tensor, size, dtype, alignment, non_finite or io
  void write(const std::string& name, const void* data, std::size_t bytes, Dtype dtype) const;

  /// Hands in tensors in parallel, each whole and once; several calls may share them out. They are
  /// read before the call returns. `options.partial` plays no part.
  ///
  /// @throws Error as Plan::load_all; tensor also for one that was handed in before. After any
  ///   failure while bytes moved, the same tensors may be handed in again.
  LoadReport write_all(Span<const Source> sources, const LoadOptions& options = {}) const;

  /// Says that the rank has handed in everything. Its bytes are on the disk when this returns.
  ///
  /// Whoever is the last checks that all ranks are there and agree, and moves the directory to the
  /// target in one step. Calling it again, also from a new process with the same id, completes an
  /// export whose last process died in between.
  ///
  /// @throws Error tensor with the tensors that were not handed in; export_conflict when replicas
  ///   differ or bytes are missing; the target is untouched then
  ExportState finish() const;

 private:
  friend struct Internals;
  struct Impl;
  explicit Exporter(std::shared_ptr<const Impl> impl) noexcept;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace megatron_bridge
