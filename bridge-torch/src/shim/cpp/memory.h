#pragma once

namespace bridge_shim {

// glibc hands large freed blocks back to the kernel, and each new one then costs page faults.
// Must run before the first tensor exists.
void keep_freed_memory();

}  // namespace bridge_shim
