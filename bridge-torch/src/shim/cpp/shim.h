#pragma once

// What the cxx bridge (ffi.rs) sees.

#include "adamw.h"
#include "attention.h"
#include "cross_entropy.h"
#include "experts.h"
#include "gdn.h"
#include "kernels.h"
#include "memory.h"
#include "pointwise.h"
#include "profile.h"
#include "tensors.h"
