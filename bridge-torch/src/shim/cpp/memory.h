#pragma once

namespace bridge_shim {

// glibc hands large freed blocks back to the kernel, and each new one then costs page faults.
// Must run before the first tensor exists.
void keep_freed_memory();

// Decays of the delta rule underflow, and arithmetic on denormal numbers is some hundred times slower.
// Holds for this thread and those that it starts later, so it must run before libtorch's threads exist.
void flush_denormals();

}  // namespace bridge_shim
