//! The comparison of a plan's result with another side, in memory.

use bridge_core::Dtype;
use bridge_core::checkpoint::{MemoryTensors, TensorInfo, TensorSource};
use bridge_core::convert::{
    Difference, ExecuteOptions, Padding, Planned, Side, VerifyOptions, execute, verify,
    verify_names,
};
use bridge_core::plan::{KeyStyle, ModelPlan, PlanOptions};
use tests::golden;

use crate::mapping::memory_for;

fn bridge(name: &str) -> bridge_core::AutoBridge {
    bridge_core::AutoBridge::from_hf_pretrained(&golden(&format!("checkpoints/{name}"))).unwrap()
}

/// What the plan gives, with one element of a tensor changed.
fn executed(plan: &ModelPlan, source: &dyn TensorSource) -> MemoryTensors {
    let memory = memory_for(plan);
    execute(plan, source, &memory, &ExecuteOptions::default()).unwrap();
    memory
}

fn changed(memory: &MemoryTensors, name: &str, byte: usize, mask: u8) -> MemoryTensors {
    let mut copy = MemoryTensors::default();
    for one in memory.names() {
        let mut bytes = memory.bytes(one).unwrap();
        if one == name {
            bytes[byte] ^= mask;
        }
        copy.insert_bytes(one, memory.info(one).unwrap(), bytes);
    }
    copy
}

/// Small buffers of odd sizes and many threads: the same element is named first, and all are counted.
#[test]
fn the_first_difference_does_not_depend_on_buffers_and_threads() {
    let bridge = bridge("moe_vl");
    let source = bridge.checkpoint().unwrap();
    let plan = bridge
        .plan_stored(&PlanOptions::default(), KeyStyle::Written)
        .unwrap();
    let memory = executed(&plan, source);
    let key = "language_model.decoder.layers.0.mlp.router.weight";
    let shape = memory.info(key).unwrap().shape;
    let (late, early) = (shape[1] + 3, 5);
    let other = changed(
        &changed(&memory, key, late * 4, 1),
        key,
        early * 4 + 3,
        0x80,
    );
    let mut results = Vec::new();
    for (threads, buffer_bytes) in [(1, 512 << 10), (4, 13), (3, 1 << 10)] {
        let mut options = VerifyOptions::default();
        options.execute.threads = threads;
        options.execute.buffer_bytes = buffer_bytes;
        assert!(verify(&plan, source, &memory, &options).unwrap().is_equal());
        let found = verify(&plan, source, &other, &options).unwrap();
        assert_eq!(found.tensors, plan.tensors.len());
        results.push(found.differences.clone());
        let names: Vec<&str> = memory.names().collect();
        let found = verify_names(&names, &memory, &other, &options).unwrap();
        results.push(found.differences);
    }
    let Difference::Values {
        elements,
        index,
        source,
        other,
        ..
    } = &results[0][0]
    else {
        panic!("{:?}", results[0]);
    };
    assert_eq!((*elements, index.as_slice()), (2, [0, 5].as_slice()));
    assert_eq!(source.value, -other.value);
    assert!(results.iter().all(|one| *one == results[0]));
}

/// Threads begin in the middle of tensors; where every value differs, the first one is still the first.
#[test]
fn the_first_of_many_differences_is_the_first_element() {
    let bridge = bridge("dense_vl");
    let source = bridge.checkpoint().unwrap();
    let names: Vec<&str> = source.names().collect();
    let mut other = MemoryTensors::default();
    for (name, info) in source.tensors() {
        let mut bytes = vec![0; usize::try_from(info.num_bytes()).unwrap()];
        source.read(name, 0, &mut bytes).unwrap();
        for byte in bytes.iter_mut().step_by(info.dtype.size_bytes()) {
            *byte ^= 1;
        }
        other.insert_bytes(name, info.clone(), bytes);
    }
    let mut options = VerifyOptions::default();
    options.execute.threads = 4;
    options.execute.buffer_bytes = 1 << 8;
    let found = verify_names(&names, source, &other, &options).unwrap();
    assert_eq!(found.differences.len(), names.len());
    for difference in &found.differences {
        let Difference::Values {
            elements,
            of,
            index,
            ..
        } = difference
        else {
            panic!("{difference:?}");
        };
        assert_eq!(elements, of);
        assert!(index.iter().all(|at| *at == 0), "{difference:?}");
    }
}

fn one(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> MemoryTensors {
    let mut memory = MemoryTensors::default();
    let shape = shape.to_vec();
    memory.insert_bytes("x", TensorInfo { dtype, shape }, bytes);
    memory
}

#[test]
fn values_are_compared_by_bits_and_integers_too() {
    let words = |words: &[u16]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let source = one(Dtype::Bf16, &[4], words(&[0x7fc0, 0x0000, 0x3f80, 0x7f80]));
    let options = VerifyOptions::default();
    let found = verify_names(&["x"], &source, &source, &options).unwrap();
    assert!(found.is_equal());
    let other = one(Dtype::Bf16, &[4], words(&[0x7fc1, 0x8000, 0x3f80, 0x7f80]));
    let found = verify_names(&["x"], &source, &other, &options).unwrap();
    let [
        Difference::Values {
            elements,
            max_distance,
            source: a,
            other: b,
            ..
        },
    ] = found.differences.as_slice()
    else {
        panic!("{found:?}");
    };
    assert_eq!((*elements, a.bits, b.bits), (2, 0x7fc0, 0x7fc1));
    assert!(max_distance.is_infinite());
    let numbers = |last: i64| {
        let numbers = [1, i64::MAX - 1, last];
        one(
            Dtype::I64,
            &[3],
            numbers
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect(),
        )
    };
    let found = verify_names(&["x"], &numbers(i64::MAX), &numbers(i64::MAX - 1), &options).unwrap();
    let [
        Difference::Values {
            index,
            source: a,
            other: b,
            ..
        },
    ] = found.differences.as_slice()
    else {
        panic!("{found:?}");
    };
    assert_eq!((index.as_slice(), a == b), ([2].as_slice(), false));
}

#[test]
fn dtypes_are_a_difference_unless_one_is_asked_for() {
    let values = [0.5f32, -1.25, 3.0];
    let wide = one(
        Dtype::F32,
        &[3],
        values.iter().flat_map(|one| one.to_le_bytes()).collect(),
    );
    let half = values.map(half::bf16::from_f32);
    let narrow = one(
        Dtype::Bf16,
        &[3],
        half.iter().flat_map(|one| one.to_le_bytes()).collect(),
    );
    let mut options = VerifyOptions::default();
    let found = verify_names(&["x"], &wide, &narrow, &options).unwrap();
    let dtype = Difference::Dtype {
        name: "x".to_owned(),
        source: Dtype::F32,
        other: Dtype::Bf16,
    };
    // The values are the same in the wider one.
    assert_eq!(found.differences, [dtype]);
    for dtype in [Dtype::Bf16, Dtype::F32, Dtype::F64] {
        options.dtype = Some(dtype);
        let found = verify_names(&["x"], &wide, &narrow, &options).unwrap();
        assert!(found.is_equal(), "{dtype}: {found:?}");
    }
    let rounded = one(
        Dtype::F32,
        &[3],
        [0.5f32, -1.25, 3.001]
            .iter()
            .flat_map(|one| one.to_le_bytes())
            .collect(),
    );
    let equal_in = |dtype| {
        let options = VerifyOptions {
            dtype: Some(dtype),
            ..VerifyOptions::default()
        };
        verify_names(&["x"], &wide, &rounded, &options)
            .unwrap()
            .is_equal()
    };
    assert!(equal_in(Dtype::Bf16) && !equal_in(Dtype::F32));
    // Whole numbers are never cast.
    let number = one(Dtype::I32, &[3], vec![0; 12]);
    let found = verify_names(&["x"], &wide, &number, &options).unwrap();
    assert!(matches!(
        found.differences.as_slice(),
        [Difference::Dtype { .. }]
    ));
}

#[test]
fn what_either_side_lacks_is_named_once() {
    let bridge = bridge("dense_vl");
    let source = bridge.checkpoint().unwrap();
    let plan = bridge.plan(&PlanOptions::default()).unwrap();
    let options = VerifyOptions::default();
    let found = verify(&plan, source, &MemoryTensors::default(), &options).unwrap();
    assert_eq!(found.differences.len(), plan.tensors.len());
    assert_eq!(found.tensors, 0);
    let found = verify(&plan, &MemoryTensors::default(), source, &options).unwrap();
    let missing = |one: &Difference| {
        matches!(
            one,
            Difference::Missing {
                from: Side::Source,
                ..
            }
        )
    };
    assert!(found.differences.iter().all(missing));
    let mut names: Vec<&str> = found.differences.iter().map(Difference::name).collect();
    names.dedup();
    assert_eq!(names.len(), found.differences.len());
}

#[test]
fn padding_is_zeros_or_nobodys_business() {
    let bridge = bridge("dense_vl");
    let source = bridge.checkpoint().unwrap();
    let plan_options = PlanOptions {
        padded_vocab_size: Some(1100),
        ..PlanOptions::default()
    };
    let plan = bridge
        .plan_stored(&plan_options, KeyStyle::Written)
        .unwrap();
    let key = "language_model.embedding.word_embeddings.weight";
    let memory = executed(&plan, source);
    let mut options = VerifyOptions::default();
    assert!(verify(&plan, source, &memory, &options).unwrap().is_equal());
    let row = memory.info(key).unwrap().shape[1] * 4;
    let padding = changed(&memory, key, 1050 * row, 1);
    let found = verify(&plan, source, &padding, &options).unwrap();
    assert!(matches!(
        found.differences.as_slice(),
        [Difference::Values { index, .. }] if index == &[1050, 0]
    ));
    options.padding = Padding::Ignore;
    let found = verify(&plan, source, &padding, &options).unwrap();
    assert!(found.is_equal());
    // The embedding and the output layer.
    assert_eq!(found.padding, 2 * 76 * (row as u64 / 4));
    let last = changed(&memory, key, 1024 * row - 1, 1);
    assert!(!verify(&plan, source, &last, &options).unwrap().is_equal());
}

/// Two plans behind each other give what the files hold, range by range.
#[test]
fn a_planned_source_is_what_execute_writes() {
    let bridge = bridge("moe_vl");
    let source = bridge.checkpoint().unwrap();
    let plan = bridge
        .plan_stored(&PlanOptions::default(), KeyStyle::Written)
        .unwrap();
    let options = ExecuteOptions::default();
    let stored = Planned::new(&plan, source, &options).unwrap();
    let memory = executed(&plan, source);
    for tensor in &plan.tensors {
        let wanted = memory.bytes(&tensor.name).unwrap();
        let mut found = vec![0; wanted.len()];
        for (number, piece) in found.chunks_mut(4 * 37).enumerate() {
            stored
                .read(&tensor.name, number as u64 * 4 * 37, piece)
                .unwrap();
        }
        assert!(found == wanted, "{}", tensor.name);
        let end = wanted.len() as u64;
        assert!(stored.read(&tensor.name, end, &mut [0; 4]).is_err());
        assert!(stored.read(&tensor.name, 2, &mut [0; 4]).is_err());
    }
    assert!(stored.info("absent").is_none() && stored.read("absent", 0, &mut []).is_err());
    let back = plan.inverted();
    let again = Planned::new(&back, &stored, &options).unwrap();
    let names: Vec<&str> = source.names().collect();
    let found = verify_names(&names, source, &again, &VerifyOptions::default()).unwrap();
    assert!(found.is_equal(), "{:?}", found.differences);
    assert_eq!(found.tensors, names.len());
}
