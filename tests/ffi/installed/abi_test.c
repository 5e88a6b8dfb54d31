/* The C interface: loads a rank, and reads what is refused.
 *   abi_test CHECKPOINT
 */
#include <megatron_bridge/megatron_bridge.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

static void check(const char* what, int good) {
  printf("%s %s\n", good ? "ok    " : "FAILED", what);
  failures += !good;
}

/* Checks the status and that the text says `text`; frees the error. */
static void refused(const char* what, bridge_status status, bridge_status wanted,
                    bridge_error** error, const char* text) {
  const char* message = bridge_error_message(*error);
  int good = status == wanted && *error != NULL && bridge_error_status(*error) == wanted &&
             strstr(message, text) != NULL;
  check(what, good);
  if (!good) {
    printf("       status %d: %s\n", (int)status, message != NULL ? message : "no error");
  }
  bridge_error_free(*error);
  *error = NULL;
}

static void* allocate(size_t bytes) {
  void* memory = malloc(bytes);
  if (memory == NULL) {
    fprintf(stderr, "no memory\n");
    exit(1);
  }
  return memory;
}

/* Everything of the rank in one call, then each tensor by itself: the bytes must agree. */
static void load(const bridge_plan* plan) {
  const size_t count = bridge_plan_size(plan);
  bridge_destination* destinations = allocate(count * sizeof(*destinations));
  bridge_load_options options = BRIDGE_LOAD_OPTIONS_INIT;
  bridge_load_report report;
  bridge_error* error = NULL;
  size_t wrong = 0;
  for (size_t i = 0; i < count; i++) {
    bridge_tensor tensor;
    if (bridge_plan_tensor(plan, i, &tensor, NULL) != BRIDGE_OK) {
      exit(1);
    }
    memset(&destinations[i], 0, sizeof(destinations[i]));
    destinations[i].name = tensor.name;
    destinations[i].data = allocate(tensor.bytes);
    destinations[i].bytes = tensor.bytes;
    destinations[i].dtype = tensor.dtype;
  }
  options.threads = 2;
  check("a rank is loaded",
        bridge_plan_load_all(plan, destinations, count, &options, &report, &error) == BRIDGE_OK);
  check("no error is made for a success", error == NULL);
  check("the report counts tensors", report.tensors == count);
  for (size_t i = 0; i < count; i++) {
    void* again = allocate(destinations[i].bytes);
    wrong += bridge_plan_load(plan, destinations[i].name, again, destinations[i].bytes,
                              destinations[i].dtype, NULL) != BRIDGE_OK ||
             memcmp(again, destinations[i].data, destinations[i].bytes) != 0;
    free(again);
    free(destinations[i].data);
  }
  check("each tensor by itself has the same bytes", wrong == 0);
  free(destinations);
}

int main(int count, char** words) {
  bridge_error* error = NULL;
  bridge_checkpoint* checkpoint = NULL;
  bridge_plan* plan = NULL;
  bridge_parallel_layout layout = BRIDGE_PARALLEL_LAYOUT_INIT;
  bridge_rank_coord rank = BRIDGE_RANK_COORD_INIT;
  float norm[1];
  if (count != 2) {
    fprintf(stderr, "usage: abi_test CHECKPOINT\n");
    return 2;
  }
  check("the library is of the header's version", bridge_abi_version() == BRIDGE_ABI_VERSION);
  refused("a directory that is not there",
          bridge_checkpoint_open("no/such/dir", NULL, &checkpoint, &error), BRIDGE_ERROR_IO, &error,
          "no/such/dir");
  refused("a path that is null", bridge_checkpoint_open(NULL, NULL, &checkpoint, &error),
          BRIDGE_ERROR_ARGUMENT, &error, "null");
  check("nothing is opened then", checkpoint == NULL);
  if (bridge_checkpoint_open(words[1], NULL, &checkpoint, &error) != BRIDGE_OK) {
    fprintf(stderr, "%s\n", bridge_error_message(error));
    bridge_error_free(error);
    return 1;
  }
  layout.tensor_model_parallel_size = 3;
  refused("a layout that does not fit",
          bridge_checkpoint_plan(checkpoint, &layout, &rank, &plan, &error), BRIDGE_ERROR_LAYOUT,
          &error, "3");
  layout.tensor_model_parallel_size = 2;
  rank.tp_rank = 1;
  check("a rank is planned",
        bridge_checkpoint_plan(checkpoint, &layout, &rank, &plan, &error) == BRIDGE_OK);
  /* The plan keeps what it needs. */
  bridge_checkpoint_free(checkpoint);
  load(plan);
  refused("a tensor of another name",
          bridge_plan_load(plan, "decoder.nothing", norm, sizeof(norm), BRIDGE_DTYPE_F32, &error),
          BRIDGE_ERROR_TENSOR, &error, "decoder.nothing");
  refused("memory of another size",
          bridge_plan_load(plan, "language_model.decoder.final_layernorm.weight", norm,
                           sizeof(norm), BRIDGE_DTYPE_F32, &error),
          BRIDGE_ERROR_SIZE, &error, "language_model.decoder.final_layernorm.weight");
  bridge_plan_free(plan);
  bridge_plan_free(NULL);
  return failures != 0;
}
