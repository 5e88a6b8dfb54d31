#![expect(unsafe_code, reason = "the cxx bridge is the border to C++")]

#[cxx::bridge]
mod bridge {
    #[namespace = "at"]
    unsafe extern "C++" {
        include!("shim.h");
        type Tensor;
    }
    #[namespace = "bridge_shim"]
    unsafe extern "C++" {
        /// Keeps freed memory in the process.
        fn keep_freed_memory();
    }
}
