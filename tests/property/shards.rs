//! Laws of what a shard says about itself: the description is untrusted text.

use std::path::Path;

use bridge_core::AutoBridge;
use bridge_core::checkpoint::Overwrite;
use bridge_core::checkpoint::TensorInfo;
use bridge_core::checkpoint::shard::{ShardFile, ShardInfo, ShardWriter};
use bridge_core::layout::{LayoutSpec, ParallelSizes, PipelineOptions, RankCoord, World};
use bridge_core::shards::ShardSet;
use proptest::prelude::*;
use tests::golden;

/// Rows of the reference's vocabulary.
const VOCABULARY: usize = 1024;

/// Sizes that are sensible, and sizes that are not.
fn any_size() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0usize..5,
        1 => Just(1 << 17),
        1 => Just(usize::MAX),
    ]
}

fn any_world() -> impl Strategy<Value = World> {
    prop_oneof![
        Just(World::Smallest),
        any_size().prop_map(World::DataParallel),
        any_size().prop_map(World::Size),
    ]
}

fn any_pipeline() -> impl Strategy<Value = PipelineOptions> {
    let text = prop_oneof![
        Just(None),
        Just(Some("Et*4|mL".to_owned())),
        Just(Some(format!("Et*4{}mL", "|".repeat((1 << 17) - 1)))),
        Just(Some("E|t|t|t|t|mL".to_owned())),
    ];
    let end = || proptest::option::of(any_size());
    (text, end(), end(), any::<bool>(), any::<bool>()).prop_map(
        |(text, first, last, embedding, loss)| PipelineOptions {
            pipeline_model_parallel_layout: text.map(|text| text.parse().unwrap()),
            num_layers_in_first_pipeline_stage: first,
            num_layers_in_last_pipeline_stage: last,
            account_for_embedding_in_pipeline_split: embedding,
            account_for_loss_in_pipeline_split: loss,
        },
    )
}

fn any_info() -> impl Strategy<Value = ShardInfo> {
    let sizes = (
        (any_size(), any_size(), any_size(), any_size(), any_size()),
        proptest::option::of(any_size()),
        any_world(),
    );
    let place = proptest::collection::vec(any_size(), 9);
    let form = (
        proptest::option::of(any_size()),
        any::<bool>(),
        any::<bool>(),
    );
    (sizes, any_pipeline(), form, place).prop_map(|(sizes, pipeline, form, place)| {
        let ((tp_size, cp_size, pp_size, ep_size, etp_size), vpp_size, world) = sizes;
        ShardInfo {
            architecture: "Qwen3_5ForConditionalGeneration".to_owned(),
            spec: LayoutSpec {
                sizes: ParallelSizes {
                    tp_size,
                    cp_size,
                    pp_size,
                    vpp_size,
                    ep_size,
                    etp_size,
                    world,
                },
                pipeline,
                make_vocab_size_divisible_by: form.0,
                sequential_experts: form.1,
                without_mtp: form.2,
                dtype: None,
            },
            padded_vocab_size: VOCABULARY,
            rank: RankCoord {
                global_rank: place[0],
                tp_rank: place[1],
                cp_rank: place[2],
                dp_rank: place[3],
                pp_rank: place[4],
                etp_rank: place[5],
                ep_rank: place[6],
                edp_rank: place[7],
            },
            vp_stage: place[8],
        }
    })
}

fn write(info: &ShardInfo, file: &Path) {
    let none: [(String, TensorInfo); 0] = [];
    let writer = ShardWriter::create(info, &none, file, Overwrite::No).unwrap();
    writer.finish().unwrap();
}

/// A small file may claim a layout of any size; what it lacks is counted and not listed.
#[test]
fn a_claim_of_131072_stages_is_refused_by_its_numbers() {
    let pp_size = 1 << 17;
    let text = format!("Et*4{}mL", "|".repeat(pp_size - 1));
    let zero = RankCoord {
        global_rank: 0,
        tp_rank: 0,
        cp_rank: 0,
        dp_rank: 0,
        pp_rank: 0,
        etp_rank: 0,
        ep_rank: 0,
        edp_rank: 0,
    };
    let info = ShardInfo {
        architecture: "Qwen3_5ForConditionalGeneration".to_owned(),
        spec: LayoutSpec {
            sizes: ParallelSizes {
                tp_size: 4,
                pp_size,
                ..ParallelSizes::default()
            },
            pipeline: PipelineOptions {
                pipeline_model_parallel_layout: Some(text.parse().unwrap()),
                ..PipelineOptions::default()
            },
            ..LayoutSpec::default()
        },
        padded_vocab_size: VOCABULARY,
        rank: zero,
        vp_stage: 0,
    };
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("rank.safetensors");
    write(&info, &file);
    let reference = AutoBridge::from_hf_pretrained(&golden("checkpoints/dense_vl")).unwrap();
    let error = ShardSet::open(&[file], &reference).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "524287 of 524288 rank files are missing, first that of rank 1 (tp_rank 1"
        ),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// What a file says comes back as it was written; a file with an absurd layout, or one of a sensible layout without
    /// tensors, is refused without being listed out in memory.
    #[test]
    fn any_description_is_read_back_and_any_claim_is_checked(info in any_info()) {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("rank.safetensors");
        write(&info, &file);
        let found = ShardFile::open(&file).unwrap();
        prop_assert_eq!(found.shard(), &info);
        let reference = AutoBridge::from_hf_pretrained(&golden("checkpoints/dense_vl")).unwrap();
        let error = ShardSet::open(&[file], &reference).unwrap_err();
        prop_assert!(!error.to_string().is_empty());
    }
}
