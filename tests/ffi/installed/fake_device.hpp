// A device that does its work as late as it may: copies wait in queues, one a stream, until
// somebody synchronises.
//
// A GPU may be ahead or behind by any amount; this one is as far behind as the calls allow, so that
// a staging buffer that is reused too early, or a copy that does not wait for the job's own work,
// shows in the result. It is libtorch's PrivateUse1; its memory is the host's.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

namespace fake_device {

/// Registers the device; once a process, before its first tensor.
void install();

at::Device device();

/// Copies that wait now, and the most that waited at once since reset_statistics().
std::size_t pending();
std::size_t most_pending();
/// Copies since then that were not to block, out of memory that is not pinned: a GPU would block.
std::size_t unpinned_copies();
void reset_statistics();

/// Does all work of all streams.
void synchronize();

}  // namespace fake_device
