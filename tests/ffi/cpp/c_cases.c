/* The C interface, in C: what it gives, and how it fails. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "megatron_bridge/megatron_bridge.h"

#define NORM "language_model.decoder.final_layernorm.weight"

/* The text that the test shows. */
static _Thread_local char failure[2048];

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      snprintf(failure, sizeof failure, "line %d: %s", __LINE__, #condition); \
      return 1;                                                               \
    }                                                                         \
  } while (0)

/* The call fails with this status and a text that holds this. */
#define FAILS(wanted_status, wanted_text, call)                                                 \
  do {                                                                                          \
    bridge_error* error = NULL;                                                                 \
    bridge_status status = (call);                                                              \
    const char* message = bridge_error_message(error);                                          \
    if (status != (wanted_status) || bridge_error_status(error) != status || message == NULL || \
        strstr(message, (wanted_text)) == NULL) {                                               \
      snprintf(failure, sizeof failure, "line %d: status %d, %s", __LINE__, (int)status,        \
               message == NULL ? "no message" : message);                                       \
      return 1;                                                                                 \
    }                                                                                           \
    bridge_error_free(error);                                                                   \
  } while (0)

#define OK(call)                                                                         \
  do {                                                                                   \
    bridge_error* error = NULL;                                                          \
    bridge_status status = (call);                                                       \
    if (status != BRIDGE_OK || error != NULL) {                                          \
      snprintf(failure, sizeof failure, "line %d: status %d, %s", __LINE__, (int)status, \
               error == NULL ? "no message" : bridge_error_message(error));              \
      return 1;                                                                          \
    }                                                                                    \
  } while (0)

static int32_t stop(void* user, uint64_t done, uint64_t total) {
  (void)done;
  (void)total;
  *(int*)user += 1;
  return 1;
}

static int32_t count(void* user, uint64_t done, uint64_t total) {
  if (done == total) {
    *(uint64_t*)user = total;
  }
  return 0;
}

static int opening(const char* dir, const char* scratch) {
  bridge_checkpoint* checkpoint = NULL;
  bridge_open_options options = BRIDGE_OPEN_OPTIONS_INIT;
  int64_t integer = 0;
  double number = 0;
  int32_t boolean = 0;
  char* text = NULL;
  (void)scratch;
  CHECK(bridge_abi_version() == BRIDGE_ABI_VERSION);
  CHECK(strchr(bridge_version(), '.') != NULL);
  FAILS(BRIDGE_ERROR_ARGUMENT, "path is null",
        bridge_checkpoint_open(NULL, NULL, &checkpoint, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "checkpoint is null",
        bridge_checkpoint_open(dir, NULL, NULL, &error));
  FAILS(BRIDGE_ERROR_IO,
        "caused by: ", bridge_checkpoint_open("/nowhere/at/all", NULL, &checkpoint, &error));
  CHECK(checkpoint == NULL);
  /* Without an error the status is all there is. */
  CHECK(bridge_checkpoint_open(NULL, NULL, &checkpoint, NULL) == BRIDGE_ERROR_ARGUMENT);
  options.struct_size = 3;
  FAILS(BRIDGE_ERROR_ARGUMENT, "begin with BRIDGE_OPEN_OPTIONS_INIT",
        bridge_checkpoint_open(dir, &options, &checkpoint, &error));
  options.struct_size = sizeof options;
  OK(bridge_checkpoint_open(dir, &options, &checkpoint, &error));
  OK(bridge_checkpoint_provider_json(checkpoint, &text, &error));
  CHECK(strstr(text, "\"num_layers\":8") != NULL);
  bridge_string_free(text);
  OK(bridge_checkpoint_provider_integer(checkpoint, "num_layers", &integer, &error));
  CHECK(integer == 8);
  OK(bridge_checkpoint_provider_number(checkpoint, "layernorm_epsilon", &number, &error));
  CHECK(number > 0 && number < 1e-3);
  OK(bridge_checkpoint_provider_boolean(checkpoint, "qk_layernorm", &boolean, &error));
  CHECK(boolean == 1);
  OK(bridge_checkpoint_provider_text(checkpoint, "normalization", &text, &error));
  CHECK(strcmp(text, "RMSNorm") == 0);
  bridge_string_free(text);
  FAILS(BRIDGE_ERROR_ARGUMENT, "did you mean `num_layers`",
        bridge_checkpoint_provider_integer(checkpoint, "num_layer", &integer, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "field is not valid UTF-8",
        bridge_checkpoint_provider_integer(checkpoint, "\xff", &integer, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "checkpoint is null",
        bridge_checkpoint_provider_json(NULL, &text, &error));
  bridge_checkpoint_free(checkpoint);
  bridge_checkpoint_free(NULL);
  bridge_error_free(NULL);
  bridge_string_free(NULL);
  CHECK(bridge_error_message(NULL) == NULL);
  CHECK(bridge_error_status(NULL) == BRIDGE_OK);
  return 0;
}

static int planning(const char* dir, const char* scratch) {
  bridge_checkpoint* checkpoint = NULL;
  bridge_plan* plan = NULL;
  bridge_parallel_layout layout = BRIDGE_PARALLEL_LAYOUT_INIT;
  bridge_rank_coord rank = BRIDGE_RANK_COORD_INIT;
  bridge_layout_info info;
  bridge_rank_place place;
  bridge_tensor tensor;
  size_t index = 0;
  (void)scratch;
  OK(bridge_checkpoint_open(dir, NULL, &checkpoint, &error));
  layout.tensor_model_parallel_size = 3;
  FAILS(BRIDGE_ERROR_LAYOUT, "is not divisible by TP 3",
        bridge_checkpoint_plan(checkpoint, &layout, NULL, &plan, &error));
  layout.tensor_model_parallel_size = 2;
  layout.data_parallel_size = 2;
  layout.world_size = 4;
  FAILS(BRIDGE_ERROR_LAYOUT, "are both given",
        bridge_checkpoint_plan(checkpoint, &layout, NULL, &plan, &error));
  layout.world_size = 0;
  layout.params_dtype = 99;
  FAILS(BRIDGE_ERROR_ARGUMENT, "dtype 99",
        bridge_checkpoint_plan(checkpoint, &layout, NULL, &plan, &error));
  layout.params_dtype = BRIDGE_DTYPE_NONE;
  info.struct_size = 0;
  FAILS(BRIDGE_ERROR_ARGUMENT, "struct_size of bridge_layout_info is 0",
        bridge_checkpoint_layout(checkpoint, &layout, &info, &error));
  info.struct_size = sizeof info;
  OK(bridge_checkpoint_layout(checkpoint, &layout, &info, &error));
  CHECK(info.world_size == 4 && info.data_parallel_size == 2);
  rank.global_rank = 4;
  FAILS(BRIDGE_ERROR_LAYOUT, "rank 4 does not exist",
        bridge_checkpoint_plan(checkpoint, &layout, &rank, &plan, &error));
  rank.global_rank = BRIDGE_BY_COORDINATES;
  rank.tp_rank = 1;
  OK(bridge_checkpoint_plan(checkpoint, &layout, &rank, &plan, &error));
  place.struct_size = sizeof place;
  OK(bridge_plan_place(plan, &place, &error));
  CHECK(place.global_rank == 1 && place.tp_rank == 1 && place.dp_rank == 0);
  CHECK(bridge_plan_size(plan) > 10 && bridge_plan_size(NULL) == 0);
  OK(bridge_plan_find(plan, NORM, &index, &error));
  OK(bridge_plan_tensor(plan, index, &tensor, &error));
  CHECK(strcmp(tensor.name, NORM) == 0);
  CHECK(tensor.num_dims == 1 && tensor.shape[0] * 4 == tensor.bytes);
  CHECK(tensor.dtype == BRIDGE_DTYPE_F32);
  FAILS(BRIDGE_ERROR_ARGUMENT, "does not exist, there are",
        bridge_plan_tensor(plan, bridge_plan_size(plan), &tensor, &error));
  FAILS(BRIDGE_ERROR_TENSOR, "did you mean `" NORM "`",
        bridge_plan_find(plan, NORM "s", &index, &error));
  bridge_plan_free(plan);
  bridge_checkpoint_free(checkpoint);
  return 0;
}

static int loading(const char* dir, const char* scratch) {
  bridge_checkpoint* checkpoint = NULL;
  bridge_plan* plan = NULL;
  bridge_tensor tensor;
  bridge_load_options options = BRIDGE_LOAD_OPTIONS_INIT;
  bridge_load_report report;
  bridge_destination destinations[2];
  bridge_cancellation* cancellation = bridge_cancellation_new();
  size_t index = 0;
  int calls = 0;
  uint64_t seen = 0;
  float* one;
  float* two;
  (void)scratch;
  OK(bridge_checkpoint_open(dir, NULL, &checkpoint, &error));
  OK(bridge_checkpoint_plan(checkpoint, NULL, NULL, &plan, &error));
  bridge_checkpoint_free(checkpoint);
  OK(bridge_plan_find(plan, NORM, &index, &error));
  OK(bridge_plan_tensor(plan, index, &tensor, &error));
  one = malloc(tensor.bytes);
  two = malloc(tensor.bytes);
  memset(two, 0, tensor.bytes);
  OK(bridge_plan_load(plan, NORM, one, tensor.bytes, BRIDGE_DTYPE_F32, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "data is null",
        bridge_plan_load(plan, NORM, NULL, tensor.bytes, BRIDGE_DTYPE_F32, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "name is null",
        bridge_plan_load(plan, NULL, two, tensor.bytes, BRIDGE_DTYPE_F32, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "plan is null",
        bridge_plan_load(NULL, NORM, two, tensor.bytes, BRIDGE_DTYPE_F32, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "dtype 0 is none of bridge_dtype",
        bridge_plan_load(plan, NORM, two, tensor.bytes, BRIDGE_DTYPE_NONE, &error));
  FAILS(BRIDGE_ERROR_DTYPE, "is of dtype U8",
        bridge_plan_load(plan, NORM, two, tensor.bytes, BRIDGE_DTYPE_U8, &error));
  FAILS(BRIDGE_ERROR_SIZE, NORM,
        bridge_plan_load(plan, NORM, two, tensor.bytes / 2, BRIDGE_DTYPE_F32, &error));
  FAILS(BRIDGE_ERROR_ALIGNMENT, NORM,
        bridge_plan_load(plan, NORM, (char*)two + 2, tensor.bytes, BRIDGE_DTYPE_F32, &error));
  memset(destinations, 0, sizeof destinations);
  destinations[0].name = NORM;
  destinations[0].data = two;
  destinations[0].bytes = tensor.bytes;
  destinations[0].dtype = BRIDGE_DTYPE_F32;
  destinations[1] = destinations[0];
  FAILS(BRIDGE_ERROR_TENSOR, "have no destination",
        bridge_plan_load_all(plan, destinations, 1, NULL, NULL, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "destinations is null",
        bridge_plan_load_all(plan, NULL, 1, NULL, NULL, &error));
  options.partial = 1;
  FAILS(BRIDGE_ERROR_OVERLAP, "overlaps at 0x",
        bridge_plan_load_all(plan, destinations, 2, &options, NULL, &error));
  options.progress = stop;
  options.progress_user = &calls;
  FAILS(BRIDGE_ERROR_CANCELLED, "cancelled after",
        bridge_plan_load_all(plan, destinations, 1, &options, NULL, &error));
  CHECK(calls == 1);
  options.progress = count;
  options.progress_user = &seen;
  /* Nothing is loaded that could not be reported. */
  FAILS(BRIDGE_ERROR_ARGUMENT, "report is not aligned",
        bridge_plan_load_all(plan, destinations, 1, &options, (void*)((char*)&report + 1), &error));
  CHECK(seen == 0);
  options.cancellation = cancellation;
  OK(bridge_plan_load_all(plan, destinations, 1, &options, &report, &error));
  CHECK(report.tensors == 1 && report.bytes == tensor.bytes && report.rounded == 0);
  CHECK(seen == tensor.bytes);
  CHECK(memcmp(one, two, tensor.bytes) == 0);
  bridge_cancellation_cancel(cancellation);
  FAILS(BRIDGE_ERROR_CANCELLED, "cancelled after 0 of",
        bridge_plan_load_all(plan, destinations, 1, &options, NULL, &error));
  bridge_cancellation_cancel(NULL);
  bridge_cancellation_free(cancellation);
  bridge_cancellation_free(NULL);
  options.struct_size = 1;
  FAILS(BRIDGE_ERROR_ARGUMENT, "BRIDGE_LOAD_OPTIONS_INIT",
        bridge_plan_load_all(plan, destinations, 1, &options, NULL, &error));
  /* Rows 1 and 2 of a vector, one element each, with a gap. */
  options.struct_size = sizeof options;
  options.cancellation = NULL;
  memset(two, 0, tensor.bytes);
  destinations[0].first_row = 1;
  destinations[0].num_rows = 2;
  destinations[0].row_stride_bytes = 8;
  destinations[0].bytes = 12;
  OK(bridge_plan_load_all(plan, destinations, 1, &options, NULL, &error));
  CHECK(two[0] == one[1] && two[1] == 0.0f && two[2] == one[2]);
  free(one);
  free(two);
  bridge_plan_free(plan);
  bridge_plan_free(NULL);
  return 0;
}

static int exporting(const char* dir, const char* scratch) {
  bridge_checkpoint* checkpoint = NULL;
  bridge_exporter* exporter = NULL;
  bridge_exporter* unfinished = NULL;
  bridge_plan* plan = NULL;
  bridge_export_options options = BRIDGE_EXPORT_OPTIONS_INIT;
  bridge_export_state state;
  bridge_load_report report;
  size_t count;
  size_t number;
  size_t removed = 7;
  bridge_source* sources;
  char target[1024];
  char taken[1024];
  FILE* file;
  snprintf(target, sizeof target, "%s/out", scratch);
  OK(bridge_checkpoint_open(dir, NULL, &checkpoint, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "target is null",
        bridge_exporter_open(checkpoint, NULL, NULL, NULL, NULL, &exporter, &error));
  options.missing = 5;
  FAILS(BRIDGE_ERROR_ARGUMENT, "missing 5 is none of bridge_missing",
        bridge_exporter_open(checkpoint, NULL, NULL, target, &options, &exporter, &error));
  options.missing = BRIDGE_MISSING_REFUSE;
  snprintf(taken, sizeof taken, "%s/taken", scratch);
  file = fopen(taken, "w");
  CHECK(file != NULL && fclose(file) == 0);
  FAILS(BRIDGE_ERROR_EXPORT, "exists and is not empty",
        bridge_exporter_open(checkpoint, NULL, NULL, taken, &options, &exporter, &error));
  CHECK(remove(taken) == 0);
  OK(bridge_exporter_open(checkpoint, NULL, NULL, target, &options, &exporter, &error));
  CHECK(bridge_exporter_is_needed(exporter) == 1 && bridge_exporter_is_needed(NULL) == 0);
  OK(bridge_exporter_plan(exporter, &plan, &error));
  FAILS(BRIDGE_ERROR_TENSOR, "were not handed in", bridge_exporter_finish(exporter, NULL, &error));
  count = bridge_plan_size(plan);
  sources = calloc(count, sizeof *sources);
  for (number = 0; number < count; ++number) {
    bridge_tensor tensor;
    void* data;
    OK(bridge_plan_tensor(plan, number, &tensor, &error));
    data = malloc(tensor.bytes + 1);
    OK(bridge_plan_load(plan, tensor.name, data, tensor.bytes, tensor.dtype, &error));
    sources[number].name = tensor.name;
    sources[number].data = data;
    sources[number].bytes = tensor.bytes;
    sources[number].dtype = tensor.dtype;
  }
  FAILS(BRIDGE_ERROR_ARGUMENT, "sources is null",
        bridge_exporter_write(exporter, NULL, 1, NULL, NULL, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "report is not aligned",
        bridge_exporter_write(exporter, sources, count, NULL, (void*)((char*)&report + 1), &error));
  OK(bridge_exporter_write(exporter, sources, count, NULL, &report, &error));
  CHECK(report.tensors == count);
  FAILS(BRIDGE_ERROR_TENSOR, "was handed in before",
        bridge_exporter_write(exporter, sources, 1, NULL, NULL, &error));
  FAILS(BRIDGE_ERROR_ARGUMENT, "state is not aligned",
        bridge_exporter_finish(exporter, (void*)((char*)&state + 1), &error));
  /* Nothing was published. */
  CHECK(fopen(target, "r") == NULL);
  OK(bridge_exporter_finish(exporter, &state, &error));
  CHECK(state.complete == 1 && state.finished == 1 && state.needed == 1);
  OK(bridge_export_discard(target, &removed, &error));
  CHECK(removed == 0);
  /* What an exporter left unfinished is discarded once, by the call that can say so. */
  snprintf(target, sizeof target, "%s/unfinished", scratch);
  OK(bridge_exporter_open(checkpoint, NULL, NULL, target, NULL, &unfinished, &error));
  bridge_exporter_free(unfinished);
  FAILS(BRIDGE_ERROR_ARGUMENT, "removed is not aligned",
        bridge_export_discard(target, (void*)((char*)&removed + 1), &error));
  OK(bridge_export_discard(target, &removed, &error));
  CHECK(removed == 1);
  for (number = 0; number < count; ++number) {
    free((void*)sources[number].data);
  }
  free(sources);
  bridge_plan_free(plan);
  bridge_exporter_free(exporter);
  bridge_exporter_free(NULL);
  bridge_checkpoint_free(checkpoint);
  return 0;
}

/* Runs a case: 0 when it held, else 1 and why not. */
int ffi_run_c(const char* name, const char* checkpoint, const char* scratch, char* text,
              size_t capacity);

int ffi_run_c(const char* name, const char* checkpoint, const char* scratch, char* text,
              size_t capacity) {
  static const struct {
    const char* name;
    int (*run)(const char*, const char*);
  } cases[] = {
      {"opening", opening}, {"planning", planning}, {"loading", loading}, {"exporting", exporting}};
  size_t number;
  snprintf(failure, sizeof failure, "there is no case %s", name);
  for (number = 0; number < sizeof cases / sizeof *cases; ++number) {
    if (strcmp(cases[number].name, name) == 0) {
      int result = cases[number].run(checkpoint, scratch);
      if (result == 0) {
        return 0;
      }
      break;
    }
  }
  snprintf(text, capacity, "%s", failure);
  return 1;
}
