#include <ATen/Context.h>
#include <malloc.h>

#include "memory.h"

namespace bridge_shim {

void keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
}

void flush_denormals() {
  at::globalContext().setFlushDenormal(true);
}

}  // namespace bridge_shim
