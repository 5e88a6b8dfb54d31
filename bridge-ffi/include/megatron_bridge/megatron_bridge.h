/**
 * @file megatron_bridge.h
 * @brief C interface of the bridge between Hugging Face checkpoints and the tensors of a
 *   Megatron-Core rank.
 *
 * A checkpoint is opened, a layout and a rank are named, and the rank's own memory is filled in
 * place:
 * @code{.c}
 * bridge_error *error = NULL;
 * bridge_checkpoint *checkpoint = NULL;
 * bridge_plan *plan = NULL;
 * bridge_parallel_layout layout = BRIDGE_PARALLEL_LAYOUT_INIT;
 * bridge_rank_coord rank = BRIDGE_RANK_COORD_INIT;
 * layout.tensor_model_parallel_size = 2;
 * rank.tp_rank = 1;
 * if (bridge_checkpoint_open("Qwen3.5-9B", NULL, &checkpoint, &error) ||
 *     bridge_checkpoint_plan(checkpoint, &layout, &rank, &plan, &error) ||
 *     bridge_plan_load(plan, "decoder.final_layernorm.weight", data, bytes, BRIDGE_DTYPE_BF16,
 *                      &error)) {
 *   fprintf(stderr, "%s\n", bridge_error_message(error));
 *   bridge_error_free(error);
 * }
 * bridge_plan_free(plan);
 * bridge_checkpoint_free(checkpoint);
 * @endcode
 *
 * Rules that hold for every function:
 * - A function that can fail returns a ::bridge_status, which is ::BRIDGE_OK (0) or says what kind
 *   of failure it was. Its last argument, which may be NULL, is then set to a new ::bridge_error
 *   with the text; it is left alone on success. Outputs are written on success only.
 * - Handles are opaque. Who gets one frees it with the matching `_free` function, which accepts
 *   NULL. A plan and an exporter keep what they need of their checkpoint: handles may be freed in
 *   any order.
 * - Everything but `_free` may be called from several threads at once on the same handle. There is
 *   no global state.
 * - No exception or panic leaves a function: a defect of the library is ::BRIDGE_ERROR_INTERNAL.
 * - Texts are UTF-8 and end with a NUL. Paths are the system's bytes.
 * - Elements are little-endian, tensors row-major. Sizes and strides are bytes where their name
 *   says so, else elements or rows.
 *
 * Names of tensors are Megatron-Core's local names: layers and experts count from 0 on each rank
 * and virtual stage, and there is no `module.` in front.
 */
#ifndef MEGATRON_BRIDGE_MEGATRON_BRIDGE_H
#define MEGATRON_BRIDGE_MEGATRON_BRIDGE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define BRIDGE_API __attribute__((visibility("default")))
#else
#define BRIDGE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** The version of this interface. Functions and fields are only ever added within one version. */
#define BRIDGE_ABI_VERSION 1u

/** The ::BRIDGE_ABI_VERSION that the library was built with: compare it with the header's when the
 * library is loaded at run time. */
BRIDGE_API uint32_t bridge_abi_version(void);

/** The library's version, `0.1.0` for example. The text lives as long as the library. */
BRIDGE_API const char* bridge_version(void);

/** What a function came to. */
typedef enum bridge_status {
  /** It did what it was asked to. */
  BRIDGE_OK = 0,
  /** An argument is null, no UTF-8, out of its range, or a struct of another version. */
  BRIDGE_ERROR_ARGUMENT = 1,
  /** The system refused: a file is missing or not readable, the disk is full. */
  BRIDGE_ERROR_IO = 2,
  /** The files are damaged, cut short, not of a supported model, or do not fit their config. */
  BRIDGE_ERROR_CHECKPOINT = 3,
  /** The layout does not fit the model, or there is no such rank or virtual stage. */
  BRIDGE_ERROR_LAYOUT = 4,
  /** There is no tensor of this name, one that is needed is not named, or one is handed in twice.
   * */
  BRIDGE_ERROR_TENSOR = 5,
  /** A buffer or a range of rows has not the size of the tensor. */
  BRIDGE_ERROR_SIZE = 6,
  /** Values cannot be converted to or from this dtype. */
  BRIDGE_ERROR_DTYPE = 7,
  /** A pointer or stride is not a multiple of the element's size. */
  BRIDGE_ERROR_ALIGNMENT = 8,
  /** Two destinations share memory. */
  BRIDGE_ERROR_OVERLAP = 9,
  /** A value is infinite or not a number, and that was not allowed. */
  BRIDGE_ERROR_NON_FINITE = 10,
  /** The work was cancelled, by a ::bridge_cancellation or by the progress callback. */
  BRIDGE_ERROR_CANCELLED = 11,
  /** An export cannot go on: the target is taken, or the ranks do not agree. */
  BRIDGE_ERROR_EXPORT = 12,
  /** A defect of the library; please report the text. */
  BRIDGE_ERROR_INTERNAL = 13
} bridge_status;

/** The type of a tensor's elements. Weights are ::BRIDGE_DTYPE_F16, ::BRIDGE_DTYPE_BF16,
 * ::BRIDGE_DTYPE_F32 or ::BRIDGE_DTYPE_F64; the others are refused with ::BRIDGE_ERROR_DTYPE
 * wherever values would be converted. */
typedef enum bridge_dtype {
  /** Not given. */
  BRIDGE_DTYPE_NONE = 0,
  BRIDGE_DTYPE_BOOL = 1,
  BRIDGE_DTYPE_U8 = 2,
  BRIDGE_DTYPE_I8 = 3,
  BRIDGE_DTYPE_F8_E4M3 = 4,
  BRIDGE_DTYPE_F8_E5M2 = 5,
  BRIDGE_DTYPE_I16 = 6,
  BRIDGE_DTYPE_U16 = 7,
  BRIDGE_DTYPE_F16 = 8,
  BRIDGE_DTYPE_BF16 = 9,
  BRIDGE_DTYPE_I32 = 10,
  BRIDGE_DTYPE_U32 = 11,
  BRIDGE_DTYPE_F32 = 12,
  BRIDGE_DTYPE_I64 = 13,
  BRIDGE_DTYPE_U64 = 14,
  BRIDGE_DTYPE_F64 = 15
} bridge_dtype;

/** Why a call failed. */
typedef struct bridge_error bridge_error;

/** What was wrong, with names and numbers, then each cause on a line of its own behind `caused by:
 * `. The text lives as long as the error; NULL for NULL. */
BRIDGE_API const char* bridge_error_message(const bridge_error* error);

/** The kind of failure, as the call returned it; ::BRIDGE_OK for NULL. */
BRIDGE_API bridge_status bridge_error_status(const bridge_error* error);

/** Frees an error. */
BRIDGE_API void bridge_error_free(bridge_error* error);

/** Frees a text that a function handed out. */
BRIDGE_API void bridge_string_free(char* text);

/* ---- Checkpoints ---- */

/** An opened checkpoint directory; its headers are read and checked, its tensors are read when they
 * are loaded. */
typedef struct bridge_checkpoint bridge_checkpoint;

/** How a checkpoint is opened. Begin with ::BRIDGE_OPEN_OPTIONS_INIT. */
typedef struct bridge_open_options {
  /** `sizeof(bridge_open_options)`. */
  size_t struct_size;
  /** For a `torch_dist` directory: the Hugging Face directory (or a config file) of the model,
   * which says what the tensors are. NULL for a Hugging Face directory. */
  const char* reference;
  /** Not 0: takes a `torch_dist` directory whose run_config.yaml contradicts the reference, or that
   * holds tensors that the reference does not know. */
  int32_t not_strict;
} bridge_open_options;

/** Options with nothing asked for. */
#define BRIDGE_OPEN_OPTIONS_INIT {sizeof(bridge_open_options), NULL, 0}

/** Opens a Hugging Face directory (config.json and safetensors files), or a `torch_dist` directory:
 * that of an iteration, or of a run, whose newest iteration is read then.
 *
 * @param path the directory
 * @param options may be NULL
 * @param[out] checkpoint free with bridge_checkpoint_free()
 * @return ::BRIDGE_ERROR_IO when a file is missing; ::BRIDGE_ERROR_CHECKPOINT when the model is not
 *   supported, a header or index is wrong, or a file is cut short; ::BRIDGE_ERROR_ARGUMENT when a
 *   `torch_dist` directory comes without a reference
 */
BRIDGE_API bridge_status bridge_checkpoint_open(const char* path,
                                                const bridge_open_options* options,
                                                bridge_checkpoint** checkpoint,
                                                bridge_error** error);

/** Frees a checkpoint. */
BRIDGE_API void bridge_checkpoint_free(bridge_checkpoint* checkpoint);

/** All fields of the model in Megatron's names (`num_layers`, `num_query_groups`, ...), as one JSON
 * object.
 *
 * @param[out] json free with bridge_string_free()
 */
BRIDGE_API bridge_status bridge_checkpoint_provider_json(const bridge_checkpoint* checkpoint,
                                                         char** json, bridge_error** error);

/** An integer field of the provider.
 * @return ::BRIDGE_ERROR_ARGUMENT when there is no such field, it is null, or of another type
 */
BRIDGE_API bridge_status bridge_checkpoint_provider_integer(const bridge_checkpoint* checkpoint,
                                                            const char* field, int64_t* value,
                                                            bridge_error** error);

/** A number field of the provider; integers are numbers too. Errors as
 * bridge_checkpoint_provider_integer(). */
BRIDGE_API bridge_status bridge_checkpoint_provider_number(const bridge_checkpoint* checkpoint,
                                                           const char* field, double* value,
                                                           bridge_error** error);

/** A boolean field of the provider, 0 or 1. Errors as bridge_checkpoint_provider_integer(). */
BRIDGE_API bridge_status bridge_checkpoint_provider_boolean(const bridge_checkpoint* checkpoint,
                                                            const char* field, int32_t* value,
                                                            bridge_error** error);

/** A text field of the provider. Errors as bridge_checkpoint_provider_integer().
 * @param[out] value free with bridge_string_free()
 */
BRIDGE_API bridge_status bridge_checkpoint_provider_text(const bridge_checkpoint* checkpoint,
                                                         const char* field, char** value,
                                                         bridge_error** error);

/* ---- Layouts and plans ---- */

/** How a model is laid out over ranks, in Megatron-Core's words. Begin with
 * ::BRIDGE_PARALLEL_LAYOUT_INIT: one rank. */
typedef struct bridge_parallel_layout {
  /** `sizeof(bridge_parallel_layout)`. */
  size_t struct_size;
  /** Ranks over which matrices are cut. */
  size_t tensor_model_parallel_size;
  /** Ranks over which layers are divided. */
  size_t pipeline_model_parallel_size;
  /** Virtual stages a pipeline rank; 0: none, or what `pipeline_model_parallel_layout` says. */
  size_t virtual_pipeline_model_parallel_size;
  /** It changes no parameter, only which ranks hold the same ones. */
  size_t context_parallel_size;
  /** Ranks over which experts are divided. */
  size_t expert_model_parallel_size;
  /** Ranks over which the matrices of an expert are cut. 1 as in Megatron Bridge's scripts;
   * Megatron-Core's own default is the tensor-parallel size. */
  size_t expert_tensor_parallel_size;
  /** 0: the smallest that the other sizes allow. */
  size_t data_parallel_size;
  /** All ranks; 0: from the other sizes. Not together with `data_parallel_size`. */
  size_t world_size;
  /** Every stage written out, as `Et*3|(tt|)*29,m|L`: embedding, decoder layers, MTP head, loss.
   * NULL: an even split. */
  const char* pipeline_model_parallel_layout;
  /** Decoder layers of the first pipeline rank; 0: an even share. */
  size_t num_layers_in_first_pipeline_stage;
  /** Decoder layers of the last pipeline rank; 0: an even share. */
  size_t num_layers_in_last_pipeline_stage;
  /** Not 0: the embedding counts as a layer of the first stage. */
  int32_t account_for_embedding_in_pipeline_split;
  /** Not 0: the output layer counts as a layer of the last stage. */
  int32_t account_for_loss_in_pipeline_split;
  /** The vocabulary is padded with zeros to a multiple of this times the tensor-parallel size; 0:
   * no padding. */
  size_t make_vocab_size_divisible_by;
  /** Not 0: experts are named one by one, as Megatron-Core does without grouped GEMM. */
  int32_t sequential_experts;
  /** Not 0: the multi-token-prediction head is left out. */
  int32_t without_mtp;
  /** A ::bridge_dtype that every parameter is planned in; ::BRIDGE_DTYPE_NONE: each keeps the
   * checkpoint's. */
  int32_t params_dtype;
} bridge_parallel_layout;

/** One rank that holds the whole model. */
#define BRIDGE_PARALLEL_LAYOUT_INIT \
  {sizeof(bridge_parallel_layout),  \
   1,                               \
   1,                               \
   0,                               \
   1,                               \
   1,                               \
   1,                               \
   0,                               \
   0,                               \
   NULL,                            \
   0,                               \
   0,                               \
   0,                               \
   0,                               \
   0,                               \
   0,                               \
   0,                               \
   BRIDGE_DTYPE_NONE}

/** `global_rank` of ::bridge_rank_coord where a rank is named by its coordinates. */
#define BRIDGE_BY_COORDINATES SIZE_MAX

/** Which rank, and which of its virtual stages. Begin with ::BRIDGE_RANK_COORD_INIT. */
typedef struct bridge_rank_coord {
  /** `sizeof(bridge_rank_coord)`. */
  size_t struct_size;
  /** The global rank in Megatron's order tp-cp-ep-dp-pp; the four coordinates below are not looked
   * at then. ::BRIDGE_BY_COORDINATES: they name the rank, the lowest one that has them. */
  size_t global_rank;
  /** Tensor-parallel rank. */
  size_t tp_rank;
  /** Pipeline rank. */
  size_t pp_rank;
  /** Expert-parallel rank. */
  size_t ep_rank;
  /** Expert-tensor-parallel rank. */
  size_t etp_rank;
  /** Virtual stage of the pipeline rank: each model chunk of a rank has a plan of its own. 0
   * without virtual stages. */
  size_t vp_stage;
} bridge_rank_coord;

/** Rank 0, by its coordinates. */
#define BRIDGE_RANK_COORD_INIT {sizeof(bridge_rank_coord), BRIDGE_BY_COORDINATES, 0, 0, 0, 0, 0}

/** What a layout comes to for a model. Set `struct_size` before the call. */
typedef struct bridge_layout_info {
  /** `sizeof(bridge_layout_info)`. */
  size_t struct_size;
  /** All ranks. */
  size_t world_size;
  /** Replicas of the dense parameters. */
  size_t data_parallel_size;
  /** Replicas of the experts. */
  size_t expert_data_parallel_size;
  /** Model chunks a pipeline rank; 1 without virtual stages. */
  size_t virtual_pipeline_model_parallel_size;
  /** Rows of the vocabulary over all tensor-parallel ranks, padding included. */
  size_t padded_vocab_size;
} bridge_layout_info;

/** Checks a layout against the model and says what it comes to.
 * @return ::BRIDGE_ERROR_LAYOUT with everything that does not fit, by parameter and numbers
 */
BRIDGE_API bridge_status bridge_checkpoint_layout(const bridge_checkpoint* checkpoint,
                                                  const bridge_parallel_layout* layout,
                                                  bridge_layout_info* info, bridge_error** error);

/** What one virtual stage of one rank holds, and how it is made of the checkpoint. */
typedef struct bridge_plan bridge_plan;

/** Plans a rank. No tensor is read.
 *
 * @param layout NULL: one rank
 * @param rank NULL: rank 0
 * @param[out] plan free with bridge_plan_free()
 * @return ::BRIDGE_ERROR_LAYOUT when the layout does not fit the model or there is no such rank;
 *   ::BRIDGE_ERROR_CHECKPOINT when the tensors of the checkpoint are not those of its config
 */
BRIDGE_API bridge_status bridge_checkpoint_plan(const bridge_checkpoint* checkpoint,
                                                const bridge_parallel_layout* layout,
                                                const bridge_rank_coord* rank, bridge_plan** plan,
                                                bridge_error** error);

/** Frees a plan. */
BRIDGE_API void bridge_plan_free(bridge_plan* plan);

/** Coordinates of a rank in both of Megatron's grids. */
typedef struct bridge_rank_place {
  /** `sizeof(bridge_rank_place)`. */
  size_t struct_size;
  size_t global_rank;
  size_t tp_rank;
  size_t cp_rank;
  size_t dp_rank;
  size_t pp_rank;
  size_t etp_rank;
  size_t ep_rank;
  size_t edp_rank;
  size_t vp_stage;
} bridge_rank_place;

/** The rank that a plan was made for. Set `struct_size` before the call. */
BRIDGE_API bridge_status bridge_plan_place(const bridge_plan* plan, bridge_rank_place* place,
                                           bridge_error** error);

/** One tensor of a rank. The pointers live as long as the handle that they came from. */
typedef struct bridge_tensor {
  /** Its local Megatron name. */
  const char* name;
  /** A ::bridge_dtype: what the layout asked for, else the checkpoint's. */
  int32_t dtype;
  /** Length of `shape`; 0 for a scalar. */
  size_t num_dims;
  /** Elements along each axis of the rank's part. */
  const size_t* shape;
  /** Bytes of the rank's part in this dtype. */
  size_t bytes;
} bridge_tensor;

/** How many tensors the rank holds; 0 for NULL, and for a stage that holds none. */
BRIDGE_API size_t bridge_plan_size(const bridge_plan* plan);

/** The tensor of a number, in Megatron's order of the model.
 * @return ::BRIDGE_ERROR_ARGUMENT when `index` is not below bridge_plan_size()
 */
BRIDGE_API bridge_status bridge_plan_tensor(const bridge_plan* plan, size_t index,
                                            bridge_tensor* tensor, bridge_error** error);

/** The number of the tensor of a name.
 * @return ::BRIDGE_ERROR_TENSOR when the rank holds none of this name; the nearest one is named
 */
BRIDGE_API bridge_status bridge_plan_find(const bridge_plan* plan, const char* name, size_t* index,
                                          bridge_error** error);

/* ---- Loading ---- */

/** Stops work that runs in another thread. One may be given to several calls. */
typedef struct bridge_cancellation bridge_cancellation;

/** A new one, not cancelled; NULL when there is no memory. Free it with bridge_cancellation_free()
 * after the calls that it was given to. */
BRIDGE_API bridge_cancellation* bridge_cancellation_new(void);

/** Asks the calls that this was given to, and later ones, to stop with ::BRIDGE_ERROR_CANCELLED.
 * May be called from any thread and from a signal handler. */
BRIDGE_API void bridge_cancellation_cancel(const bridge_cancellation* cancellation);

/** Frees it. */
BRIDGE_API void bridge_cancellation_free(bridge_cancellation* cancellation);

/** How far the work is. Called in the thread that made the call, at most every 50 ms, and once at
 * the end.
 *
 * @param user what the options hold
 * @param bytes_done bytes of destinations that are filled (of sources that are written, for an
 *   export)
 * @param bytes_total bytes of all of them
 * @return 0 to go on; anything else stops the work with ::BRIDGE_ERROR_CANCELLED
 */
typedef int32_t (*bridge_progress)(void* user, uint64_t bytes_done, uint64_t bytes_total);

/** How tensors are loaded or written. Begin with ::BRIDGE_LOAD_OPTIONS_INIT. */
typedef struct bridge_load_options {
  /** `sizeof(bridge_load_options)`. */
  size_t struct_size;
  /** Threads; 0: one a core. They end with the call. Beside the tensors themselves a call needs at
   * most 2 MiB a thread. */
  size_t threads;
  /** May be NULL. */
  bridge_progress progress;
  /** What `progress` is called with. */
  void* progress_user;
  /** May be NULL. */
  const bridge_cancellation* cancellation;
  /** Not 0: infinities and NaN are carried like any other value instead of being refused. */
  int32_t allow_non_finite;
  /** Not 0: tensors of the plan may be left out; without it that is ::BRIDGE_ERROR_TENSOR. */
  int32_t partial;
} bridge_load_options;

/** All cores, no callback; everything must be named and finite. */
#define BRIDGE_LOAD_OPTIONS_INIT {sizeof(bridge_load_options), 0, NULL, NULL, NULL, 0, 0}

/** Memory of the caller that a tensor, or a range of its rows, is to stand in.
 *
 * A row is one index of the first axis: a tensor of shape [out, in] has `out` rows of `in`
 * elements, one of shape [n] has n rows of one element. Each row is contiguous; the rows stand
 * `row_stride_bytes` apart.
 */
typedef struct bridge_destination {
  /** The tensor's local Megatron name. */
  const char* name;
  /** The first byte; a multiple of the element's size. Nothing outside the rows is touched. May be
   * NULL where there are no rows. */
  void* data;
  /** Bytes that are the caller's from `data` on: exactly those of the rows where they touch, else
   * at least up to the end of the last row. */
  size_t bytes;
  /** A ::bridge_dtype that values are cast to on the way (to nearest, ties to even). */
  int32_t dtype;
  /** From the beginning of a row to that of the next, a multiple of the element's size; 0: the rows
   * touch. */
  size_t row_stride_bytes;
  /** The first row of the tensor that is wanted. */
  size_t first_row;
  /** How many rows are wanted; 0: all from `first_row` on. */
  size_t num_rows;
} bridge_destination;

/** What a load did. */
typedef struct bridge_load_report {
  /** Destinations that were filled. */
  size_t tensors;
  /** Bytes that were written to them. */
  uint64_t bytes;
  /** Destinations some of whose values were rounded: a cast to a narrower dtype, or a norm that
   * Megatron keeps minus one. */
  size_t rounded;
  /** Seconds it took. */
  double seconds;
} bridge_load_report;

/** Fills one tensor in the calling thread.
 *
 * @param name its local Megatron name
 * @param data `bytes` bytes of the caller's, aligned for `dtype`; row-major, contiguous
 * @param bytes elements of the tensor times bytes of `dtype`
 * @param dtype a ::bridge_dtype; values are cast to it on the way
 * @return ::BRIDGE_ERROR_ARGUMENT for NULL, ::BRIDGE_ERROR_TENSOR, ::BRIDGE_ERROR_SIZE,
 *   ::BRIDGE_ERROR_DTYPE, ::BRIDGE_ERROR_ALIGNMENT before any byte is touched; ::BRIDGE_ERROR_IO,
 *   ::BRIDGE_ERROR_CHECKPOINT, ::BRIDGE_ERROR_NON_FINITE while reading, after which the content of
 *   `data` is undefined
 */
BRIDGE_API bridge_status bridge_plan_load(const bridge_plan* plan, const char* name, void* data,
                                          size_t bytes, int32_t dtype, bridge_error** error);

/** Fills many tensors in parallel. Where dtypes agree, bytes are read straight into their
 * destination.
 *
 * @param destinations `count` of them; a tensor may have several, no two may share memory, and
 *   every tensor of the plan has one unless the options say `partial`
 * @param options may be NULL
 * @param[out] report may be NULL
 * @return as bridge_plan_load(); also ::BRIDGE_ERROR_OVERLAP, ::BRIDGE_ERROR_TENSOR with the
 *   tensors that have no destination, ::BRIDGE_ERROR_CANCELLED
 */
BRIDGE_API bridge_status bridge_plan_load_all(const bridge_plan* plan,
                                              const bridge_destination* destinations, size_t count,
                                              const bridge_load_options* options,
                                              bridge_load_report* report, bridge_error** error);

/* ---- Exporting ---- */

/** One rank's part in making a Hugging Face directory. */
typedef struct bridge_exporter bridge_exporter;

/** What happens to tensors of the reference that no rank has (an MTP head that was left out). */
typedef enum bridge_missing {
  /** They are an error. */
  BRIDGE_MISSING_REFUSE = 0,
  /** They are copied from the reference. */
  BRIDGE_MISSING_COPY = 1
} bridge_missing;

/** How a directory is made. Begin with ::BRIDGE_EXPORT_OPTIONS_INIT. All ranks of an export give
 * the same options. */
typedef struct bridge_export_options {
  /** `sizeof(bridge_export_options)`. */
  size_t struct_size;
  /** Names this export among all exports to the same target: equal on all its ranks, and another
   * one for the next try; letters, digits, `-` and `_`. Something that the ranks broadcast, for
   * example the iteration and a random number. NULL is allowed where one rank is enough. */
  const char* export_id;
  /** Not 0: a directory at the target is replaced, in one step. */
  int32_t overwrite;
  /** A ::bridge_missing. */
  int32_t missing;
} bridge_export_options;

/** No replacement, nothing may be missing, no id. */
#define BRIDGE_EXPORT_OPTIONS_INIT {sizeof(bridge_export_options), NULL, 0, BRIDGE_MISSING_REFUSE}

/** Joins an export as one virtual stage of one rank; the first to come makes the directory.
 *
 * The files, dtypes, expert layout, tokenizer and configs are those of `reference`, a Hugging Face
 * checkpoint with weights. What is made stands hidden beside `target` (`.NAME.ID.export`) until all
 * ranks have finished: preallocated files, into which every rank writes ranges of its own.
 * Parameters that several ranks hold are written by the first of them; the others are compared with
 * it.
 *
 * @param layout,rank as for bridge_checkpoint_plan(); name the rank by its global rank where the
 *   layout has replicas
 * @param target the directory to make, on a file system that all ranks share
 * @param options may be NULL
 * @param[out] exporter free with bridge_exporter_free()
 * @return ::BRIDGE_ERROR_EXPORT when the target is taken, or the ranks that came before have
 *   another layout, reference or other options; ::BRIDGE_ERROR_TENSOR when tensors of the reference
 *   are missing; ::BRIDGE_ERROR_IO, also when the disk has not enough room
 */
BRIDGE_API bridge_status bridge_exporter_open(const bridge_checkpoint* reference,
                                              const bridge_parallel_layout* layout,
                                              const bridge_rank_coord* rank, const char* target,
                                              const bridge_export_options* options,
                                              bridge_exporter** exporter, bridge_error** error);

/** Frees an exporter. One that has not finished leaves its export unfinished: nothing appears at
 * the target. */
BRIDGE_API void bridge_exporter_free(bridge_exporter* exporter);

/** What the rank is to hand in: a plan of the same layout and rank. It cannot be loaded by the
 * exporter.
 * @param[out] plan free with bridge_plan_free()
 */
BRIDGE_API bridge_status bridge_exporter_plan(const bridge_exporter* exporter, bridge_plan** plan,
                                              bridge_error** error);

/** Whether the rank is needed: 0 where a lower rank has the same parameters (data and context
 * parallelism). What such a rank hands in is checked and dropped. */
BRIDGE_API int32_t bridge_exporter_is_needed(const bridge_exporter* exporter);

/** Memory of the caller that holds a tensor. */
typedef struct bridge_source {
  /** The tensor's local Megatron name. */
  const char* name;
  /** The first byte; a multiple of the element's size. */
  const void* data;
  /** Bytes that may be read from `data` on; as in ::bridge_destination. */
  size_t bytes;
  /** A ::bridge_dtype; values are cast to the reference's dtype on the way. */
  int32_t dtype;
  /** As in ::bridge_destination. */
  size_t row_stride_bytes;
} bridge_source;

/** Hands in tensors, each whole and once; several calls may share them out. They are read before
 * the call returns.
 *
 * @param options may be NULL; `partial` plays no part
 * @param[out] report may be NULL
 * @return as bridge_plan_load_all(); ::BRIDGE_ERROR_TENSOR also for one that was handed in before.
 *   After any failure while bytes moved, the same tensors may be handed in again.
 */
BRIDGE_API bridge_status bridge_exporter_write(const bridge_exporter* exporter,
                                               const bridge_source* sources, size_t count,
                                               const bridge_load_options* options,
                                               bridge_load_report* report, bridge_error** error);

/** What stands of an export. */
typedef struct bridge_export_state {
  /** Not 0: the directory stands at the target, complete. */
  int32_t complete;
  /** Stages of ranks that have finished. */
  size_t finished;
  /** Stages of ranks that are needed. */
  size_t needed;
} bridge_export_state;

/** Says that the rank has handed in everything. Its bytes are on the disk when this returns.
 *
 * Whoever is the last checks that all ranks are there and agree, and moves the directory to the
 * target in one step. A process that dies before leaves the target as it was. Calling it again,
 * also from a new process with the same id, completes an export whose last process died in between.
 *
 * @param[out] state may be NULL
 * @return ::BRIDGE_ERROR_TENSOR with the tensors that were not handed in; ::BRIDGE_ERROR_EXPORT
 *   when replicas differ or bytes are missing; the target is untouched then
 */
BRIDGE_API bridge_status bridge_exporter_finish(const bridge_exporter* exporter,
                                                bridge_export_state* state, bridge_error** error);

/** Removes what unfinished exports to `target` left beside it; those that still run are taken away
 * too.
 * @param[out] removed how many; may be NULL
 */
BRIDGE_API bridge_status bridge_export_discard(const char* target, size_t* removed,
                                               bridge_error** error);

#ifdef __cplusplus
}
#endif

#endif /* MEGATRON_BRIDGE_MEGATRON_BRIDGE_H */
