//! The C++ shim: the only place of this crate that crosses into C++ and uses `unsafe`.

mod ffi;
mod libraries;

pub use ffi::bridge::OpTime;
pub(crate) use ffi::{absent, at, bridge, one, own, pair};
pub use libraries::{load_cuda, load_operators};

/// What the kernels of this build were compiled for, such as `sm_90a`, between blanks; empty without kernels.
pub(crate) const KERNEL_ARCHITECTURES: &str = env!("BRIDGE_KERNEL_ARCHITECTURES");

/// Whether the kernel library has `megatron_bridge::name` for a GPU (`cuda`) or for the CPU.
pub(crate) fn has_operator(name: &str, cuda: bool) -> bool {
    bridge::has_operator(name, cuda)
}

/// Keeps freed memory in the process, so that large tensors do not cost page faults each time they are made.
///
/// A choice of the whole process: call it before the first tensor exists, and say so to the user.
pub fn keep_freed_memory() {
    bridge::keep_freed_memory();
}

/// Takes denormal numbers as zero, as `torch.set_flush_denormal` does: decays of the delta rule underflow, and processors
/// are some hundred times slower on denormals.
///
/// Holds for the calling thread and those started later: call it in `main`, before the first tensor exists.
pub fn flush_denormals() {
    bridge::flush_denormals();
}

/// Runs `work` and times every operator and autograd node in it, the slowest first.
///
/// For whoever looks for the next thing to make faster; one profile at a time. On a GPU it is the host's time.
pub fn profile<T>(work: impl FnOnce() -> T) -> (T, Vec<OpTime>) {
    bridge::start_profile();
    let result = work();
    let mut ops = bridge::stop_profile();
    ops.sort_by_key(|op| std::cmp::Reverse(op.own_ns));
    (result, ops)
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    #[test]
    fn denormals_count_as_zero_where_they_are_flushed() {
        let halved = || {
            let smallest = Tensor::from_slice(&[f32::MIN_POSITIVE]);
            (smallest * 0.5).double_value(&[0])
        };
        let flushed = std::thread::spawn(move || {
            super::flush_denormals();
            halved()
        });
        assert!(halved() > 0.0);
        assert_eq!(flushed.join().expect("the thread ends"), 0.0);
    }
}
