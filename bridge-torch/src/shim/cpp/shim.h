#pragma once

// What the cxx bridge (ffi.rs) sees.

#include "adamw.h"
#include "memory.h"
