//! Megatron names, shapes, splits and bytes against what Megatron Bridge gave for the same checkpoints.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bridge_core::AutoBridge;
use bridge_core::checkpoint::{MemoryTensors, TensorInfo, TensorSource};
use bridge_core::config::HfConfig;
use bridge_core::convert::{ExecuteOptions, execute};
use bridge_core::plan::{Cut, ModelPlan, PlanOptions, Role};
use bridge_core::provider::Provider;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tests::golden;

use crate::checkpoint::{ALL, directory};

fn json(name: &str) -> Value {
    let path = golden(&format!("megatron/{name}"));
    serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn shape(value: &Value) -> Vec<usize> {
    let dims = value.as_array().unwrap().iter();
    dims.map(|dim| usize::try_from(dim.as_u64().unwrap()).unwrap())
        .collect()
}

/// Room in memory for the plan's targets.
pub(crate) fn memory_for(plan: &ModelPlan) -> MemoryTensors {
    let mut memory = MemoryTensors::default();
    for tensor in &plan.tensors {
        memory.insert(
            &tensor.name,
            TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
            },
        );
    }
    memory
}

/// The plan's targets in memory.
fn carried_out(plan: &ModelPlan, source: &dyn TensorSource) -> MemoryTensors {
    let memory = memory_for(plan);
    execute(plan, source, &memory, &ExecuteOptions::default()).unwrap();
    memory
}

fn check_mapping(checkpoint: &str, suffix: &str, sequential_experts: bool) {
    let scratch = tempfile::tempdir().unwrap();
    let bridge = AutoBridge::from_hf_pretrained(&directory(checkpoint, scratch.path())).unwrap();
    let plan = bridge
        .plan(&PlanOptions {
            sequential_experts,
            ..PlanOptions::default()
        })
        .unwrap();
    let expected = json(&format!("mapping.{checkpoint}{suffix}.json"));
    let expected = expected["parameters"].as_array().unwrap();
    let mut left: BTreeMap<&str, _> = plan
        .tensors
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor))
        .collect();
    for entry in expected {
        let name = entry["megatron"].as_str().unwrap();
        let tensor = left
            .remove(name)
            .unwrap_or_else(|| panic!("{checkpoint}: {name} is not in the plan"));
        assert_eq!(tensor.shape, shape(&entry["shape"]), "{name}");
        assert_eq!(tensor.split.word(), entry["tp"], "{name}");
        let expert = entry.get("expert").and_then(Value::as_u64);
        assert_eq!(tensor.expert.map(|x| x as u64), expert, "{name}");
        let mut ours: Vec<_> = tensor
            .sources
            .iter()
            .map(|source| (source.name.as_str(), source.shape.clone()))
            .collect();
        let mut theirs: Vec<_> = entry["hf"]
            .as_object()
            .unwrap()
            .values()
            .map(|hf| (hf["name"].as_str().unwrap(), shape(&hf["shape"])))
            .collect();
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs, "{name}");
    }
    assert!(left.is_empty(), "{checkpoint}: {:?}", left.keys());
}

#[test]
fn names_shapes_splits_and_experts_are_megatrons() {
    // The goldens have no mapping of dense_vl_kv2; its bytes are compared below.
    for checkpoint in ALL.into_iter().filter(|name| *name != "dense_vl_kv2") {
        check_mapping(checkpoint, "", false);
    }
}

#[test]
fn sequential_expert_names_are_megatrons() {
    for checkpoint in ["moe_vl", "moe_vl_mtp_packed"] {
        check_mapping(checkpoint, ".sequential", true);
    }
}

/// Compares the bytes of every rank of `layout`, which has one pipeline stage.
fn check_shards(checkpoint: &str, layout: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let bridge = AutoBridge::from_hf_pretrained(&directory(checkpoint, scratch.path())).unwrap();
    let golden = json(&format!("shards.{checkpoint}.json"));
    let sizes = &golden["layouts"][layout];
    assert_eq!(sizes["pp"], 1, "{layout} has one stage");
    let size = |key: &str| usize::try_from(sizes[key].as_u64().unwrap()).unwrap();
    let overrides = &sizes["overrides"];
    let mut ranks = 0;
    for rank in golden["ranks"].as_array().unwrap() {
        if rank["layout"] != layout {
            continue;
        }
        ranks += 1;
        let number = |key: &str| usize::try_from(rank[key].as_u64().unwrap()).unwrap();
        let tp_size = size("tp");
        let padding = overrides["make_vocab_size_divisible_by"].as_u64();
        let vocab = bridge.config().text.vocab_size;
        let options = PlanOptions {
            // Megatron casts everything to the dtype of the config.
            dtype: bridge.config().text.dtype,
            sequential_experts: overrides["moe_grouped_gemm"] == false,
            without_mtp: overrides.get("mtp_num_layers").is_some_and(Value::is_null),
            padded_vocab_size: padding.map(|divisor| {
                let multiple = usize::try_from(divisor).unwrap() * tp_size;
                vocab.next_multiple_of(multiple)
            }),
            cut: Cut {
                tp_rank: number("tp"),
                tp_size,
                etp_rank: number("etp"),
                etp_size: size("etp"),
                ep_rank: number("ep"),
                ep_size: size("ep"),
            },
            ..PlanOptions::default()
        };
        let plan = bridge.plan(&options).unwrap();
        let memory = carried_out(&plan, bridge.checkpoint().unwrap());
        let params = rank["stages"][0]["params"].as_array().unwrap();
        for param in params {
            let name = param[0].as_str().unwrap();
            let tensor = plan
                .tensor(name)
                .unwrap_or_else(|| panic!("{checkpoint} {layout}: {name} is not in the plan"));
            assert_eq!(tensor.dtype.safetensors_word(), param[1], "{name}");
            assert_eq!(tensor.shape, shape(&param[2]), "{name}");
            let bytes = memory.bytes(name).unwrap();
            assert_eq!(sha256(&bytes), param[3], "{checkpoint} {layout} {name}");
            assert!(number("tp") > 0 || tensor.role == Role::Primary, "{name}");
        }
        assert_eq!(params.len(), plan.tensors.len(), "{checkpoint} {layout}");
    }
    assert_eq!(ranks, size("world"), "{checkpoint} {layout}");
}

#[test]
fn every_parameter_at_tp1_has_megatrons_bytes() {
    for checkpoint in [
        "dense_vl",
        "dense_vl_tied_bf16",
        "moe_vl",
        "moe_vl_bf16",
        "dense_vl_kv2",
        "dense_vl_deepstack",
        "dense_text",
        "moe_text",
        "dense_token_classification",
    ] {
        check_shards(checkpoint, "tp1");
    }
    check_shards("moe_vl", "seq_tp1");
    check_shards("moe_vl", "seq_nomtp_tp1");
    check_shards("dense_vl", "nomtp");
    check_shards("dense_vl", "pad96_tp1");
}

#[test]
fn every_tensor_parallel_rank_has_megatrons_bytes() {
    for (checkpoint, layouts) in [
        ("dense_vl", &["tp2", "tp4", "tp2_cp2", "pad96_tp2"][..]),
        ("dense_vl_tied_bf16", &["tp2", "tp4"]),
        (
            "moe_vl",
            &["tp2", "tp4", "etp2_tp2", "tp2_etp4", "pad96_tp2"],
        ),
        ("moe_vl_bf16", &["tp2"]),
        ("dense_vl_deepstack", &["tp2"]),
        // Padding of the vocabulary works in the original here: these bytes are its own.
        ("dense_text", &["tp2", "pad96_tp2"]),
        ("dense_token_classification", &["tp2"]),
    ] {
        for layout in layouts {
            check_shards(checkpoint, layout);
        }
    }
}

#[test]
fn every_expert_parallel_rank_has_megatrons_bytes() {
    for (checkpoint, layouts) in [
        (
            "moe_vl",
            &[
                "ep2",
                "ep4",
                "tp2_ep2_etp1",
                "tp2_ep2_etp2",
                "tp1_ep2_etp2",
                "seq_tp2_ep2_etp2",
                "seq_nomtp_tp2_ep2_etp2",
            ][..],
        ),
        ("moe_vl_bf16", &["ep2", "ep4"]),
        ("moe_vl_mtp_packed", &["tp2_ep2_etp1"]),
        ("moe_vl_per_expert", &["tp2_ep2_etp1"]),
    ] {
        for layout in layouts {
            check_shards(checkpoint, layout);
        }
    }
}

#[test]
fn a_cut_through_the_middle_of_a_query_group_has_megatrons_bytes() {
    // Two key-value heads over four ranks.
    check_shards("dense_vl_kv2", "tp2");
    check_shards("dense_vl_kv2", "tp4");
}

/// Fields of Megatron's providers that ours leave out, and why.
const LEFT_OUT: &[(&str, &[&str])] = &[
    (
        "the Hugging Face sub-configs as they are; held by HfConfig and compared below",
        &["hf_text_config", "vision_config"],
    ),
    (
        "a mechanism of mixture-of-experts training that no published model uses; Core's default",
        &[
            "moe_apply_probs_on_input",
            "moe_combine_bwd_dtype",
            "moe_deepep_num_sms",
            "moe_dispatch_fwd_dtype",
            "moe_enable_deepep",
            "moe_enable_routing_replay",
            "moe_expert_capacity_factor",
            "moe_expert_rank_capacity_factor",
            "moe_flex_dispatcher_backend",
            "moe_flex_dispatcher_num_sms",
            "moe_grad_scale_func",
            "moe_hybridep_num_blocks_permute",
            "moe_hybridep_num_blocks_unpermute",
            "moe_hybridep_num_sms",
            "moe_hybridep_num_sms_preprocessing",
            "moe_hybridep_pad_uneven_dispatch_inputs",
            "moe_input_jitter_eps",
            "moe_latent_size",
            "moe_layer_recompute",
            "moe_mlp_glu_interleave_size",
            "moe_ncclep_zero_copy",
            "moe_pad_expert_input_to_capacity",
            "moe_pad_experts_for_cuda_graph_inference",
            "moe_paged_stash",
            "moe_paged_stash_buffer_size_factor_cpu",
            "moe_paged_stash_buffer_size_factor_cuda",
            "moe_paged_stash_page_size",
            "moe_per_layer_logging",
            "moe_permute_fusion_into_hybridep",
            "moe_router_bias_update_rate",
            "moe_router_force_biased",
            "moe_router_force_load_balancing",
            "moe_router_fusion",
            "moe_router_group_topk",
            "moe_router_num_groups",
            "moe_router_padding_for_fp8",
            "moe_router_padding_for_quantization",
            "moe_router_quantile_balancing_ema",
            "moe_router_topk_limited_devices",
            "moe_router_topk_scaling_factor",
            "moe_shared_expert_glu_interleave_size",
            "moe_shared_expert_overlap",
            "moe_single_grouped_bias",
            "moe_single_grouped_weight",
            "moe_token_drop_policy",
            "moe_token_dropping",
            "moe_use_grouped_tensor",
            "moe_z_loss_coeff",
            "overlap_moe_expert_parallel_comm",
        ],
    ),
    (
        "an 8- or 4-bit recipe of a run",
        &[
            "disable_parameter_transpose_cache",
            "first_last_layers_bf16",
            "fp4",
            "fp4_param",
            "fp4_quantizer_factory",
            "fp4_recipe",
            "fp8",
            "fp8_amax_compute_algo",
            "fp8_amax_history_len",
            "fp8_dot_product_attention",
            "fp8_interval",
            "fp8_margin",
            "fp8_multi_head_attention",
            "fp8_output_proj",
            "fp8_param",
            "fp8_quantizer_factory",
            "fp8_recipe",
            "fp8_wgrad",
            "kitchen_attention_backend",
            "num_layers_at_end_in_bf16",
            "num_layers_at_start_in_bf16",
            "quant_recipe",
            "tp_only_amax_red",
            "use_kitchen",
            "use_kitchen_attention",
        ],
    ),
    (
        "parallel sizes and communication: a run's layout",
        &[
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
            "barrier_with_L1_time",
            "batch_p2p_comm",
            "batch_p2p_sync",
            "context_parallel_size",
            "cp_comm_type",
            "deallocate_pipeline_outputs",
            "defer_embedding_wgrad_compute",
            "delay_wgrad_compute",
            "ep_overlap_early_attn_memory_release",
            "expert_gtp_weight_remat_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_num_weight_shards",
            "expert_tensor_parallel_size",
            "grad_sync_func",
            "gtp_remat_opt_in_modules",
            "gtp_weight_remat_size",
            "hierarchical_context_parallel_sizes",
            "high_priority_a2a_comm_stream",
            "hybrid_context_parallel",
            "inference_fuse_tp_communication",
            "max_seqlen_per_dp_cp_rank",
            "microbatch_group_size_per_vp_stage",
            "nccl_all_reduce_for_prefill",
            "no_sync_func",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "num_microbatches_with_partial_activation_checkpoints",
            "overlap_dispatch_backward_with_experts_wgrad",
            "overlap_p2p_comm",
            "overlap_p2p_comm_warmup_flush",
            "parallel_output",
            "param_sync_func",
            "pipeline_dtype",
            "pipeline_model_parallel_comm_backend",
            "pipeline_model_parallel_layout",
            "pipeline_model_parallel_size",
            "sequence_parallel",
            "symmetric_ar_type",
            "tensor_model_parallel_size",
            "tensor_parallel_num_weight_shards",
            "tp_comm_atomic_ag",
            "tp_comm_atomic_rs",
            "tp_comm_bootstrap_backend",
            "tp_comm_bulk_dgrad",
            "tp_comm_bulk_wgrad",
            "tp_comm_overlap",
            "tp_comm_overlap_ag",
            "tp_comm_overlap_cfg",
            "tp_comm_overlap_disable_fc1",
            "tp_comm_overlap_disable_qkv",
            "tp_comm_overlap_rs",
            "tp_comm_overlap_rs_dgrad",
            "tp_comm_split_ag",
            "tp_comm_split_rs",
            "use_ring_exchange_p2p",
            "variable_seq_lengths",
            "virtual_pipeline_model_parallel_size",
            "wgrad_deferral_limit",
        ],
    ),
    (
        "where an attention variant that this model does not have is set",
        &[
            "activation_func_clamp_value",
            "activation_func_fp8_input_store",
            "dsa_indexer_head_dim",
            "dsa_indexer_k_norm_epsilon",
            "dsa_indexer_k_norm_fp32",
            "dsa_indexer_loss_coeff",
            "dsa_indexer_n_heads",
            "dsa_indexer_rope_interleaved",
            "dsa_indexer_rotate_activation",
            "dsa_indexer_scoring_relu",
            "dsa_indexer_skip_topk_offset",
            "dsa_indexer_topk",
            "dsa_indexer_topk_freq",
            "dsa_indexer_use_sparse_loss",
            "dsa_kernel_backend",
            "enable_mhc_connections",
            "experimental_attention_variant_loss_scale_func",
            "gdp_cutedsl_kernel",
            "gdp_num_chunk_states_to_recompute",
            "gdp_num_householder",
            "glu_linear_offset",
            "heterogeneous_block_specs",
            "is_hybrid_model",
            "log_max_attention_logit",
            "logit_dtype",
            "mamba_head_dim",
            "mamba_num_groups",
            "mamba_num_heads",
            "mamba_state_dim",
            "mamba_training_ssm_states_dtype",
            "mhc_init_gating_factor",
            "mhc_num_residual_streams",
            "mhc_recompute_layer_num",
            "mhc_sinkhorn_iterations",
            "mtp_hsm",
            "mtp_hybrid_override_pattern",
            "multi_latent_attention",
            "mup_attn_scale_power",
            "mup_base_head_dim",
            "mup_base_hidden_size",
            "mup_embedding_mult",
            "mup_output_mult",
            "mup_width_mult",
            "no_rope_freq",
            "qk_clip",
            "qk_clip_alpha",
            "qk_clip_threshold",
            "qk_l2_norm",
            "rope_scaling",
            "rope_scaling_factor",
            "rotary_scaling_factor",
            "seq_len_interpolation_factor",
            "softmax_scale",
            "softmax_type",
            "use_arbitrary_attention_mask",
            "use_mamba_mem_eff_path",
            "use_mup",
            "window_attn_skip_freq",
            "window_size",
            "yarn_beta_fast",
            "yarn_beta_slow",
            "yarn_correction_range_round_to_int",
            "yarn_mscale",
            "yarn_mscale_all_dim",
            "yarn_original_max_position_embeddings",
            "yarn_rotary_scaling_factor",
        ],
    ),
    (
        "memory, offloading and recomputation of a run",
        &[
            "_cpu_offloading_context",
            "activation_offload_fraction",
            "cpu_offloading",
            "cpu_offloading_activations",
            "cpu_offloading_double_buffering",
            "cpu_offloading_num_layers",
            "cpu_offloading_retain_pinned_cpu_buffers",
            "cpu_offloading_weights",
            "delay_offload_until_cuda_graph",
            "delta_offload_bytes_across_pp_ranks",
            "distribute_saved_activations",
            "fine_grained_activation_offloading",
            "fine_grained_offloading_max_inflight_offloads",
            "memory_efficient_layer_norm",
            "min_offloaded_tensor_size",
            "offload_modules",
            "recompute_granularity",
            "recompute_method",
            "recompute_modules",
            "recompute_num_layers",
        ],
    ),
    (
        "CUDA graphs of a run",
        &[
            "cuda_graph_impl",
            "cuda_graph_modules",
            "cuda_graph_retain_backward_graph",
            "cuda_graph_scope",
            "cuda_graph_use_single_mempool",
            "cuda_graph_warmup_steps",
            "enable_cuda_graph",
            "external_cuda_graph",
            "inference_cuda_graph_scope",
            "max_vision_cuda_graph_seq_length",
            "vision_cuda_graph_impl",
            "vision_cuda_graph_scope",
        ],
    ),
    (
        "inference settings of Megatron",
        &[
            "flash_decode",
            "inference_disable_triton_nvls_kernels",
            "inference_grouped_gemm_backend",
            "inference_moe_disable_fused_quant_kernels",
            "inference_moe_token_dispatcher_type",
            "inference_rng_tracker",
            "inference_sampling_seed",
            "mlp_chunks_for_prefill",
            "mlp_chunks_for_training",
            "use_inference_optimized_layers",
        ],
    ),
    (
        "a fusion or backend of Megatron's own kernels",
        &[
            "apply_rope_fusion",
            "apply_rotary_pos_emb_in_fp32",
            "attention_backend",
            "autocast_dtype",
            "batch_invariant_backend",
            "batch_invariant_mode",
            "bias_dropout_fusion",
            "cross_entropy_fusion_impl",
            "cross_entropy_loss_fusion",
            "dense_grouped_gemm",
            "deterministic_mode",
            "disable_bf16_reduced_precision_matmul",
            "enable_autocast",
            "flash_attention_version",
            "fp16_lm_cross_entropy",
            "fused_residual_rmsnorm",
            "fused_single_qkv_rope",
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "persist_layer_norm",
            "transformer_impl",
            "use_fused_weighted_squared_relu",
            "use_grouped_gemm_for_dense_mlp",
            "use_grouped_gemm_for_shared_expert",
            "use_te_activation_func",
            "use_te_rng_tracker",
            "use_transformer_engine_full_layer_spec",
            "use_transformer_engine_op_fuser",
        ],
    ),
    (
        "initialisation of a run from nothing",
        &[
            "embedding_init_method",
            "embedding_init_method_std",
            "init_method",
            "init_model_with_meta_device",
            "output_layer_init_method",
            "perform_initialization",
            "use_cpu_initialization",
        ],
    ),
    (
        "state, hooks and habits of a Megatron process, without meaning for the model",
        &[
            "_pg_collection",
            "apply_query_key_layer_scaling",
            "apply_residual_connection_post_layernorm",
            "calculate_per_token_loss",
            "clone_scatter_output_in_embedding",
            "config_logger_dir",
            "finalize_model_grads_func",
            "fp32_residual_connection",
            "grad_scale_func",
            "hf_model_revision",
            "mtp_enabled",
            "mtp_grad_scale_func",
            "mtp_standalone",
            "restore_modelopt_state",
            "test_mode",
            "timers",
        ],
    ),
];

/// Fields of the mixture of experts stand in the dense provider too, at Core's defaults and without effect.
const MOE_ONLY: &str = "moe_";

fn same(ours: &Value, theirs: &Value) -> bool {
    match (ours.as_f64(), theirs.as_f64()) {
        (Some(ours), Some(theirs)) => ours == theirs,
        _ => ours == theirs,
    }
}

/// Every checkpoint and every published config, with the file that holds its provider.
fn provider_cases() -> Vec<(String, PathBuf)> {
    let mut cases: Vec<(String, PathBuf)> = [
        "checkpoints/dense_vl",
        "checkpoints/dense_vl_tied_bf16",
        "checkpoints/moe_vl",
        "checkpoints/moe_vl_bf16",
        "megatron/checkpoints/dense_vl_kv2",
        "megatron/checkpoints/dense_text",
        "megatron/checkpoints/moe_text",
        "megatron/checkpoints/dense_token_classification",
    ]
    .into_iter()
    .map(|dir| {
        let name = dir.rsplit('/').next().unwrap();
        (name.to_owned(), golden(dir).join("config.json"))
    })
    .collect();
    for entry in fs_err::read_dir(golden("configs")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if name != "parameter_counts" {
            cases.push((name, path));
        }
    }
    assert_eq!(cases.len(), 18);
    cases
}

#[test]
fn providers_have_megatrons_fields_and_values() {
    for (name, path) in provider_cases() {
        let bridge = AutoBridge::from_hf_config(HfConfig::from_file(&path).unwrap());
        let provider = bridge.to_megatron_provider();
        let golden = json(&format!("provider.{name}.json"));
        assert_eq!(provider.class_name(), golden["provider"], "{name}");
        let is_moe = matches!(provider, Provider::Moe(_));
        let ours = serde_json::to_value(&provider).unwrap();
        let ours = ours.as_object().unwrap();
        let theirs = golden["fields"].as_object().unwrap();
        for (field, value) in ours {
            let wanted = theirs.get(field);
            let wanted = wanted.unwrap_or_else(|| panic!("{name}: {field} is no field"));
            assert!(same(value, wanted), "{name}: {field} {value} {wanted}");
        }
        let left_out: Vec<&str> = LEFT_OUT.iter().flat_map(|group| group.1).copied().collect();
        for field in theirs.keys().filter(|field| !ours.contains_key(*field)) {
            let known = left_out.contains(&field.as_str());
            let moe_only = !is_moe && field.starts_with(MOE_ONLY);
            assert!(
                known || moe_only,
                "{name}: {field} is left out for no reason"
            );
        }
        for field in left_out {
            assert!(!ours.contains_key(field), "{field} is not left out");
        }
    }
}

#[test]
fn configs_have_transformers_defaults() {
    for (name, path) in provider_cases() {
        let config = HfConfig::from_file(&path).unwrap();
        let golden = json(&format!("provider.{name}.json"));
        let Some(vision) = config.vision.as_ref() else {
            // The provider of a language model alone does not hold the config that it was made of.
            assert!(golden["fields"].get("hf_text_config").is_none(), "{name}");
            continue;
        };
        let text = &golden["fields"]["hf_text_config"];
        let number = |key: &str| text[key].as_u64().map(|n| usize::try_from(n).unwrap());
        let ours = &config.text;
        assert_eq!(Some(ours.vocab_size), number("vocab_size"), "{name}");
        assert_eq!(Some(ours.hidden_size), number("hidden_size"), "{name}");
        assert_eq!(
            ours.intermediate_size,
            number("intermediate_size"),
            "{name}"
        );
        assert_eq!(Some(ours.head_dim), number("head_dim"), "{name}");
        let words: Vec<&str> = ours.layer_types.iter().map(|kind| kind.hf_word()).collect();
        assert_eq!(serde_json::json!(words), text["layer_types"], "{name}");
        assert_eq!(ours.bos_token_id, text["bos_token_id"].as_i64(), "{name}");
        assert_eq!(ours.pad_token_id, text["pad_token_id"].as_i64(), "{name}");
        let theirs = &golden["fields"]["vision_config"];
        let number = |key: &str| usize::try_from(theirs[key].as_u64().unwrap()).unwrap();
        assert_eq!(vision.depth, number("depth"), "{name}");
        assert_eq!(vision.num_heads, number("num_heads"), "{name}");
        let positions = number("num_position_embeddings");
        assert_eq!(vision.num_position_embeddings, positions, "{name}");
    }
}
