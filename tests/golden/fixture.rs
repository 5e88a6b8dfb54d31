//! What the model's golden tests share: files as tensors, batches out of them, distances.

use std::collections::BTreeMap;
use std::path::Path;

use bridge_core::AutoBridge;
use bridge_torch::batch::Batch;
use bridge_torch::model::{ModelOptions, Qwen3VlModel};
use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};
use tests::golden;

/// Tensors of a safetensors file by name.
pub(crate) struct Tensors(pub(crate) BTreeMap<String, Tensor>);

impl Tensors {
    pub(crate) fn read(path: &Path) -> Self {
        let bytes = fs_err::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let kind = match view.dtype() {
                Dtype::F64 => Kind::Double,
                Dtype::F32 => Kind::Float,
                Dtype::BF16 => Kind::BFloat16,
                Dtype::I64 => Kind::Int64,
                Dtype::I32 => Kind::Int,
                other => panic!("no golden holds {other:?}"),
            };
            let size: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            (name, Tensor::from_data_size(view.data(), &size, kind))
        });
        Self(tensors.collect())
    }

    pub(crate) fn golden(name: &str) -> Self {
        Self::read(&golden(name))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    pub(crate) fn at(&self, name: &str) -> &Tensor {
        self.get(name)
            .unwrap_or_else(|| panic!("no golden tensor {name}"))
    }

    /// The batch under a prefix (`in.`, `batch.0.`, ...).
    pub(crate) fn batch(&self, prefix: &str) -> Batch {
        let get = |name: &str| {
            self.get(&format!("{prefix}{name}"))
                .map(Tensor::shallow_clone)
        };
        Batch {
            input_ids: get("input_ids").unwrap(),
            attention_mask: get("attention_mask"),
            labels: get("labels"),
            mm_token_type_ids: get("mm_token_type_ids"),
            pixel_values: get("pixel_values"),
            image_grid_thw: get("image_grid_thw").map_or_else(Vec::new, |grids| triples(&grids)),
            pixel_values_videos: get("pixel_values_videos"),
            video_grid_thw: get("video_grid_thw").map_or_else(Vec::new, |grids| triples(&grids)),
            cu_seqlens: None,
        }
    }
}

pub(crate) fn triples(grids: &Tensor) -> Vec<[i64; 3]> {
    let flat: Vec<i64> = Vec::try_from(grids.to_kind(Kind::Int64).view([-1])).unwrap();
    flat.chunks(3)
        .map(|grid| [grid[0], grid[1], grid[2]])
        .collect()
}

/// A golden checkpoint and its model.
pub(crate) fn model(name: &str, dtype: Kind, mtp: bool) -> (AutoBridge, Qwen3VlModel) {
    let bridge = AutoBridge::from_hf_pretrained(&golden("checkpoints").join(name)).unwrap();
    let options = ModelOptions {
        dtype,
        mtp,
        ..ModelOptions::default()
    };
    let model = Qwen3VlModel::load(&bridge, &options).unwrap();
    (bridge, model)
}

/// max |a - b| / max |b|, in float64.
pub(crate) fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let wide = |t: &Tensor| t.detach().to_kind(Kind::Double);
    let (found, expected) = (wide(found), wide(expected));
    if expected.numel() == 0 {
        return 0.0;
    }
    let largest = expected.abs().max().double_value(&[]);
    let apart = (found - expected).abs().max().double_value(&[]);
    assert!(apart.is_finite(), "a value is not finite");
    if largest == 0.0 {
        apart
    } else {
        apart / largest
    }
}

/// A scalar's value.
pub(crate) fn value(scalar: &Tensor) -> f64 {
    scalar.detach().to_kind(Kind::Double).double_value(&[])
}

/// Rows of `[batch, seq, ..]` or `[batch * seq, ..]` where the mask is 1.
pub(crate) fn real_rows(tensor: &Tensor, mask: &Tensor) -> Tensor {
    let width = tensor.size().last().copied().unwrap_or(1);
    let index = mask.view([-1]).nonzero().view([-1]);
    tensor.reshape([-1, width]).index_select(0, &index)
}
