//! Properties: layout.

use std::collections::HashSet;

use bridge_core::AutoBridge;
use bridge_core::config::HfConfig;
use bridge_core::layout::{
    Axis, CutSize, LayerWord, ModelFacts, ParallelLayout, ParallelSizes, PipelineLayout,
    PipelineOptions, World,
};
use bridge_core::plan::{Fill, PlanOptions, Role, Stage, gather};
use proptest::prelude::*;
use tests::golden;

fn facts(num_layers: usize, mtp: bool, tied: bool, experts: Option<usize>) -> ModelFacts {
    ModelFacts {
        num_layers,
        mtp_num_layers: usize::from(mtp),
        vocab_size: 1000,
        make_vocab_size_divisible_by: Some(8),
        num_experts: experts,
        vision: true,
        share_embeddings_and_output_weights: tied,
        cut_sizes: experts
            .map(|size| CutSize {
                parameter: "num_experts",
                size,
                axis: Axis::Ep,
            })
            .into_iter()
            .collect(),
    }
}

fn any_sizes() -> impl Strategy<Value = ParallelSizes> {
    let small = 1..5usize;
    (
        small.clone(),
        small.clone(),
        small.clone(),
        small.clone(),
        small,
        prop::option::of(1..4usize),
        prop_oneof![
            Just(World::Smallest),
            (1..40usize).prop_map(World::Size),
            (1..5usize).prop_map(World::DataParallel)
        ],
    )
        .prop_map(
            |(tp_size, cp_size, pp_size, ep_size, etp_size, vpp_size, world)| ParallelSizes {
                tp_size,
                cp_size,
                pp_size,
                vpp_size,
                ep_size,
                etp_size,
                world,
            },
        )
}

fn any_options() -> impl Strategy<Value = PipelineOptions> {
    let end = || prop::option::weighted(0.3, 0..6usize);
    (end(), end(), any::<bool>(), any::<bool>()).prop_map(|(first, last, embedding, loss)| {
        PipelineOptions {
            pipeline_model_parallel_layout: None,
            num_layers_in_first_pipeline_stage: first,
            num_layers_in_last_pipeline_stage: last,
            account_for_embedding_in_pipeline_split: embedding && first.is_none() && last.is_none(),
            account_for_loss_in_pipeline_split: loss && first.is_none() && last.is_none(),
        }
    })
}

/// Stages that fit a model: embedding first, decoder layers anywhere, the head behind them, the loss last.
fn any_written() -> impl Strategy<Value = (PipelineLayout, usize, usize)> {
    (1..5usize, 1..4usize, any::<bool>())
        .prop_flat_map(|(pp_size, vp_size, mtp)| {
            let stages = pp_size * if pp_size == 1 { 1 } else { vp_size };
            (
                prop::collection::vec(0..4usize, stages),
                Just(pp_size),
                Just(usize::from(mtp)),
            )
        })
        .prop_map(|(counts, pp_size, mtp)| {
            let mut stages: Vec<Vec<LayerWord>> = counts
                .iter()
                .map(|count| vec![LayerWord::Decoder; *count])
                .collect();
            stages[0].insert(0, LayerWord::Embedding);
            let last = stages.last_mut().unwrap();
            last.extend(std::iter::repeat_n(LayerWord::Mtp, mtp));
            last.push(LayerWord::Loss);
            (PipelineLayout::new(stages), pp_size, mtp)
        })
}

/// Every layer on exactly one stage, in stage order; every part where Megatron has it.
fn assert_chunks(layout: &ParallelLayout, facts: &ModelFacts) {
    let chunks = layout.chunks();
    let mut next = 0;
    for (stage, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk.vp_stage * layout.pp_size() + chunk.pp_rank, stage);
        assert_eq!(chunk.layers.start, next, "{}", layout.table());
        next = chunk.layers.end;
        assert_eq!(layout.chunk(chunk.pp_rank, chunk.vp_stage).unwrap(), chunk);
        assert_eq!(chunk.embedding, stage == 0 || chunk.mtp_num_layers > 0);
    }
    assert_eq!(next, facts.num_layers);
    assert_eq!(chunks.len(), layout.pp_size() * layout.vp_size());
    let count = |has: fn(&bridge_core::layout::Chunk) -> bool| {
        chunks.iter().filter(|chunk| has(chunk)).count()
    };
    assert_eq!(count(|chunk| chunk.vision), 1);
    assert_eq!(count(|chunk| chunk.final_layernorm), 1);
    assert_eq!(
        count(|chunk| chunk.mtp_num_layers > 0),
        facts.mtp_num_layers
    );
    let tied_on_one = facts.share_embeddings_and_output_weights && chunks.len() == 1;
    assert_eq!(count(|chunk| chunk.output_layer), usize::from(!tied_on_one));
}

proptest! {
    /// Over the world each coordinate of either grid occurs once, and every layer is on one stage, every expert on one
    /// rank; or the layout is refused. Nothing panics.
    #[test]
    fn ranks_layers_and_experts_are_partitioned(
        sizes in any_sizes(),
        options in any_options(),
        num_layers in 1..25usize,
        mtp: bool,
        tied: bool,
        experts in prop::option::of(prop::sample::select(vec![4usize, 12, 24])),
    ) {
        let facts = facts(num_layers, mtp, tied, experts);
        let Ok(layout) = ParallelLayout::new(&sizes, &options, &facts) else {
            return Ok(());
        };
        assert_chunks(&layout, &facts);
        let (mut dense, mut expert) = (HashSet::new(), HashSet::new());
        for (number, coord) in layout.ranks().enumerate() {
            prop_assert_eq!(coord.global_rank, number);
            prop_assert!(coord.tp_rank < layout.tp_size() && coord.cp_rank < layout.cp_size());
            prop_assert!(coord.dp_rank < layout.dp_size() && coord.pp_rank < layout.pp_size());
            prop_assert!(coord.ep_rank < layout.ep_size() && coord.etp_rank < layout.etp_size());
            prop_assert!(coord.edp_rank < layout.edp_size());
            prop_assert!(dense.insert((coord.tp_rank, coord.cp_rank, coord.dp_rank, coord.pp_rank)));
            prop_assert!(expert.insert((coord.etp_rank, coord.ep_rank, coord.edp_rank, coord.pp_rank)));
            prop_assert_eq!(layout.coord(number).unwrap(), coord);
            let first = layout
                .first_rank(coord.tp_rank, coord.pp_rank, coord.ep_rank, coord.etp_rank)
                .unwrap();
            prop_assert!(first.global_rank <= number);
            prop_assert_eq!((first.tp_rank, first.pp_rank), (coord.tp_rank, coord.pp_rank));
            prop_assert_eq!((first.ep_rank, first.etp_rank), (coord.ep_rank, coord.etp_rank));
        }
        prop_assert_eq!(dense.len(), layout.world_size());
        prop_assert!(layout.coord(layout.world_size()).is_err());
        let held: Vec<usize> = (0..layout.ep_size()).flat_map(|rank| layout.experts(rank)).collect();
        prop_assert_eq!(held, (0..experts.unwrap_or(0)).collect::<Vec<_>>());
    }

    /// Every split can be written as a layout string, and the string gives the same stages back.
    #[test]
    fn a_split_printed_as_a_layout_string_is_the_same_split(
        sizes in any_sizes(),
        options in any_options(),
        num_layers in 1..25usize,
        mtp: bool,
    ) {
        let facts = facts(num_layers, mtp, false, Some(12));
        let Ok(layout) = ParallelLayout::new(&sizes, &options, &facts) else {
            return Ok(());
        };
        let text = layout.pipeline_layout().to_string();
        let written = PipelineOptions {
            pipeline_model_parallel_layout: Some(text.parse().unwrap()),
            ..PipelineOptions::default()
        };
        let again = ParallelLayout::new(&sizes, &written, &facts);
        prop_assert_eq!(again.as_ref(), Ok(&layout), "{}", text);
        prop_assert_eq!(again.unwrap().table(), layout.table());
    }

    /// What is printed parses to the same stages, as a string and as lists of words; fitting layouts are accepted.
    #[test]
    fn written_layouts_survive_printing_and_parsing((layout, pp_size, mtp) in any_written()) {
        let text = layout.to_string();
        prop_assert_eq!(&text.parse::<PipelineLayout>().unwrap(), &layout, "{}", text);
        let words: Vec<Vec<&str>> = layout
            .stages()
            .iter()
            .map(|stage| stage.iter().map(|layer| layer.word()).collect())
            .collect();
        prop_assert_eq!(&PipelineLayout::from_words(&words).unwrap(), &layout);
        let num_layers = layout.stages().iter().flatten().filter(|one| **one == LayerWord::Decoder).count();
        let facts = facts(num_layers, mtp > 0, false, None);
        let sizes = ParallelSizes { pp_size, ..ParallelSizes::default() };
        let options = PipelineOptions {
            pipeline_model_parallel_layout: Some(layout.clone()),
            ..PipelineOptions::default()
        };
        let parallel = ParallelLayout::new(&sizes, &options, &facts).unwrap();
        assert_chunks(&parallel, &facts);
        prop_assert_eq!(parallel.pipeline_layout(), layout);
    }

    /// Text near the grammar and text far from it: parsed or refused, never a panic, never a large layout.
    #[test]
    fn hostile_layout_strings_are_parsed_or_refused(
        text in prop_oneof![
            "[EtmL|(),*0-9]{0,40}",
            "(\\((t|\\||\\(|m){0,6}\\)\\*[0-9]{1,25}|[tmEL|,*()]){0,12}",
            ".{0,40}",
        ],
        pp_size in 1..5usize,
        num_layers in 0..9usize,
        mtp: bool,
    ) {
        let Ok(layout) = text.parse::<PipelineLayout>() else {
            return Ok(());
        };
        let written_out: usize = layout.stages().iter().map(|stage| stage.len() + 1).sum();
        prop_assert!(written_out <= (1 << 18) + 1);
        prop_assert_eq!(&layout.to_string().parse::<PipelineLayout>().unwrap(), &layout);
        let facts = facts(num_layers, mtp, false, None);
        let sizes = ParallelSizes { pp_size, ..ParallelSizes::default() };
        let options = PipelineOptions {
            pipeline_model_parallel_layout: Some(layout),
            ..PipelineOptions::default()
        };
        if let Ok(layout) = ParallelLayout::new(&sizes, &options, &facts) {
            assert_chunks(&layout, &facts);
        }
    }

    /// Sizes of any magnitude are refused or give a layout; nothing overflows or allocates by them.
    #[test]
    fn absurd_sizes_are_refused(
        sizes in prop::array::uniform6(prop_oneof![0..3usize, any::<usize>()]),
        world in prop_oneof![Just(World::Smallest), any::<usize>().prop_map(World::Size), any::<usize>().prop_map(World::DataParallel)],
        options in any_options(),
        num_layers in prop_oneof![0..3usize, Just(100_000usize)],
    ) {
        let [tp_size, cp_size, pp_size, ep_size, etp_size, vpp_size] = sizes;
        let sizes = ParallelSizes { tp_size, cp_size, pp_size, vpp_size: Some(vpp_size), ep_size, etp_size, world };
        let facts = facts(num_layers, true, false, Some(12));
        match ParallelLayout::new(&sizes, &options, &facts) {
            Ok(layout) => prop_assert!(layout.world_size() >= 1 && layout.chunks().len() <= 1 << 18),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

fn any_tiny_model() -> impl Strategy<Value = HfConfig> {
    let name = prop::sample::select(vec![
        "checkpoints/dense_vl",
        "checkpoints/dense_vl_tied_bf16",
        "checkpoints/moe_vl",
        "megatron/checkpoints/dense_text",
        "megatron/checkpoints/moe_text",
        "megatron/checkpoints/dense_token_classification",
    ]);
    (name, any::<bool>()).prop_map(|(name, tied)| {
        let mut config = HfConfig::from_dir(&golden(name)).unwrap();
        config.tie_word_embeddings = tied && config.classifier.is_none();
        config
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Over all stages of all ranks the primaries cover every element of every Hugging Face tensor exactly once, every
    /// replica has a primary, and no stage reads an element that it does not hold.
    #[test]
    fn stages_cover_the_model_once_and_read_nothing_else(
        config in any_tiny_model(),
        tp_size in prop::sample::select(vec![1usize, 2, 4]),
        ep_size in prop::sample::select(vec![1usize, 2, 4, 8]),
        etp_size in prop::sample::select(vec![1usize, 2, 4]),
        sizes in any_sizes(),
        pipeline in any_options(),
        padding in prop::option::of(1..200usize),
        without_mtp: bool,
        sequential_experts: bool,
    ) {
        let bridge = AutoBridge::from_hf_config(config);
        let options = PlanOptions { without_mtp, sequential_experts, ..PlanOptions::default() };
        let mut facts = bridge.layout_facts(&options);
        facts.make_vocab_size_divisible_by = padding;
        let ep_size = if facts.num_experts.is_some() { ep_size } else { 1 };
        let sizes = ParallelSizes { tp_size, ep_size, etp_size, cp_size: 1, ..sizes };
        let Ok(layout) = ParallelLayout::new(&sizes, &pipeline, &facts) else {
            return Ok(());
        };
        let stages: Vec<Stage<'_>> = Stage::all(&layout).collect();
        let plans = bridge.plan_stages(&options, &stages).unwrap();
        let mut primaries = HashSet::new();
        let mut replicas = HashSet::new();
        for tensor in plans.iter().flat_map(|plan| &plan.tensors) {
            let read: usize = tensor.copies.iter().map(|copy| copy.rows * copy.row_elements).sum();
            let padded = tensor.fill.map_or(0, |Fill::ZerosFrom(start)| tensor.numel() - start);
            prop_assert_eq!(read + padded, tensor.numel(), "{}", tensor.name);
            // Local numbers differ from stage to stage: what a tensor holds is its sources.
            let held: Vec<&str> = tensor.sources.iter().map(|source| source.name.as_str()).collect();
            match tensor.role {
                Role::Primary => primaries.insert((held, tensor.expert)),
                Role::ReplicaOf(_) => replicas.insert((held, tensor.expert)),
            };
        }
        prop_assert!(replicas.is_subset(&primaries));
        let registry = bridge.registry().unwrap();
        let wanted = registry.hf_parameters().len() - plans[0].left_out.len();
        let labels = (0..).map(|number| format!("{number}/"));
        let gathered = gather(labels.zip(plans.iter().cloned())).unwrap();
        prop_assert_eq!(gathered.tensors.len(), wanted);
        // A stage that stands twice shows.
        let labels = (0..).map(|number| format!("{number}/"));
        let twice = labels.zip(plans.iter().chain(&plans[..1]).cloned());
        prop_assert!(gather(twice).is_err());
    }
}
