#![expect(
    clippy::too_many_arguments,
    unsafe_code,
    unreachable_pub,
    reason = "the cxx bridge is the border to C++, and its macro makes every function pub and hands over each tensor of an op"
)]

#[cxx::bridge]
pub(crate) mod bridge {
    /// Time that an operator took without the operators that it called.
    #[namespace = "bridge_shim"]
    #[derive(Debug, Clone)]
    pub struct OpTime {
        /// libtorch's name of the operator or of the autograd node, and the shapes of its tensors.
        pub name: String,
        /// How often it ran.
        pub calls: u64,
        /// In nanoseconds, over all calls.
        pub own_ns: u64,
    }

    /// How [`AdamW`] steps.
    #[namespace = "bridge_shim"]
    #[derive(Debug, Clone, Copy)]
    pub struct AdamWSettings {
        pub beta1: f64,
        pub beta2: f64,
        pub eps: f64,
        /// Whether bfloat16 parameters are stepped as float32 masters.
        pub masters: bool,
        /// Whether kernels step, and not libtorch; only they know what follows.
        pub kernels: bool,
        /// Whether moments are codes of 8 bits.
        pub eight_bit: bool,
        /// Whether bfloat16 parameters without masters are rounded at random.
        pub stochastic: bool,
        /// Of the roundings.
        pub seed: u64,
    }

    #[namespace = "at"]
    unsafe extern "C++" {
        include!("shim.h");
        type Tensor;
    }
    #[namespace = "bridge_shim"]
    unsafe extern "C++" {
        fn keep_freed_memory();
        fn flush_denormals();
        fn start_profile();
        fn stop_profile() -> Vec<OpTime>;

        fn linear_cross_entropy(
            hidden: &Tensor,
            weight: &Tensor,
            targets: &Tensor,
            normalizer: f64,
        ) -> Result<UniquePtr<Tensor>>;
        fn routed_experts(
            x: &Tensor,
            weights: &Tensor,
            fc1: &Tensor,
            fc2: &Tensor,
            experts: &Tensor,
        ) -> Result<UniquePtr<Tensor>>;
        fn short_attention(
            q: &Tensor,
            k: &Tensor,
            v: &Tensor,
            bias: &Tensor,
            causal: bool,
            seen: i64,
        ) -> Result<UniquePtr<Tensor>>;

        type Tensors;
        fn at(self: &Tensors, index: usize) -> Result<UniquePtr<Tensor>>;
        fn gated_delta_rule(
            q: &Tensor,
            k: &Tensor,
            v: &Tensor,
            decay: &Tensor,
            beta: &Tensor,
            state: &Tensor,
            mask: &Tensor,
            cu_seqlens: &[i64],
        ) -> Result<UniquePtr<Tensors>>;
        fn gdn_core(
            x: &Tensor,
            conv: &Tensor,
            a_log: &Tensor,
            dt_bias: &Tensor,
            norm: &Tensor,
            conv_state: &Tensor,
            state: &Tensor,
            mask: &Tensor,
            cu_seqlens: &[i64],
            key_heads: i64,
            key_dim: i64,
            eps: f64,
        ) -> Result<UniquePtr<Tensors>>;

        fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<UniquePtr<Tensor>>;
        fn swiglu(x: &Tensor) -> Result<UniquePtr<Tensor>>;

        fn load_operators(path: &str) -> Result<()>;
        fn has_operator(name: &str, cuda: bool) -> bool;
        fn kernel_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<UniquePtr<Tensor>>;
        fn kernel_add_rms_norm(
            x: &Tensor,
            residual: &Tensor,
            weight: &Tensor,
            eps: f64,
        ) -> Result<UniquePtr<Tensors>>;
        fn kernel_swiglu(x: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn kernel_mrope_table(
            positions: &Tensor,
            frequencies: &Tensor,
            section: &[i64],
            like: &Tensor,
        ) -> Result<UniquePtr<Tensors>>;
        fn kernel_mrope(
            q: &Tensor,
            k: &Tensor,
            cos: &Tensor,
            sin: &Tensor,
        ) -> Result<UniquePtr<Tensors>>;
        fn kernel_chunk_map(cu_seqlens: &Tensor, tokens: i64) -> Result<UniquePtr<Tensor>>;
        fn kernel_gdn_core(
            x: &Tensor,
            conv1d: &Tensor,
            a_log: &Tensor,
            dt_bias: &Tensor,
            out_norm: &Tensor,
            conv_state: &Tensor,
            state: &Tensor,
            cu_seqlens: &Tensor,
            chunk_map: &Tensor,
            key_heads: i64,
            eps: f64,
            output_final_state: bool,
        ) -> Result<UniquePtr<Tensors>>;
        fn kernel_route(logits: &Tensor, top_k: i64) -> Result<UniquePtr<Tensors>>;
        fn kernel_routed_experts(
            x: &Tensor,
            weights: &Tensor,
            fc1: &Tensor,
            fc2: &Tensor,
            experts: &Tensor,
            shared: &Tensor,
            gate: &Tensor,
        ) -> Result<UniquePtr<Tensor>>;
        fn kernel_linear_cross_entropy(
            hidden: &Tensor,
            weight: &Tensor,
            targets: &Tensor,
            normalizer: f64,
        ) -> Result<UniquePtr<Tensor>>;

        type AdamW;
        fn new_adamw(settings: &AdamWSettings) -> UniquePtr<AdamW>;
        fn add(self: Pin<&mut AdamW>, param: &Tensor, weight_decay: f64) -> Result<()>;
        fn step(self: Pin<&mut AdamW>, lr: f64, max_norm: f64) -> Result<f64>;
        fn zero_grad(self: &AdamW);
        fn state(self: &AdamW, index: usize, part: &str) -> Result<UniquePtr<Tensor>>;
        fn publish(self: &AdamW) -> Result<()>;
    }
}

/// C++'s view of a tensor of ours.
pub(crate) fn at(tensor: &tch::Tensor) -> &bridge::Tensor {
    // SAFETY: tch's `C_tensor` is an `at::Tensor`, alive as long as the borrow.
    unsafe { &*tensor.as_ptr().cast::<bridge::Tensor>() }
}

/// Takes over a tensor that C++ made.
pub(crate) fn own(tensor: cxx::UniquePtr<bridge::Tensor>) -> tch::Tensor {
    // SAFETY: the pointer comes from `std::make_unique<at::Tensor>`, and tch frees it with `delete`.
    unsafe { tch::Tensor::from_ptr(tensor.into_raw().cast()) }
}

/// The tensor that C++ reads as absent.
pub(crate) fn absent() -> tch::Tensor {
    tch::Tensor::new()
}

/// Takes over the result of a call whose shapes are our invariant.
///
/// # Panics
/// When libtorch or a kernel refused the call, with its reason.
pub(crate) fn one(result: Result<cxx::UniquePtr<bridge::Tensor>, cxx::Exception>) -> tch::Tensor {
    result.map_or_else(|error| failed(&error), own)
}

/// Takes over the two results of a call whose shapes are our invariant.
///
/// # Panics
/// When libtorch or a kernel refused the call, with its reason.
pub(crate) fn pair(
    result: Result<cxx::UniquePtr<bridge::Tensors>, cxx::Exception>,
) -> (tch::Tensor, tch::Tensor) {
    let take = |tensors: &bridge::Tensors, index| tensors.at(index).map(own);
    result
        .and_then(|tensors| Ok((take(&tensors, 0)?, take(&tensors, 1)?)))
        .unwrap_or_else(|error| failed(&error))
}

fn failed(error: &cxx::Exception) -> ! {
    panic!("an op of the model failed: {}", error.what())
}
