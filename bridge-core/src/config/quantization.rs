//! `quantization_config`: how matrices are stored in fewer bits.

use serde_json::{Map, Value};

use super::ConfigProblem;
use super::reader::Reader;

/// Its key, at the top of the file.
const KEY: &str = "quantization_config";

/// Rows and columns of a block where the file does not say.
const BLOCK: [usize; 2] = [128, 128];

/// Block-wise FP8, the one form that hub checkpoints of this family have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// Rows and columns that share a scale.
    pub weight_block_size: [usize; 2],
}

impl Default for QuantizationConfig {
    fn default() -> Self {
        Self {
            weight_block_size: BLOCK,
        }
    }
}

impl QuantizationConfig {
    /// `None` where the file has none.
    pub(super) fn read(outer: &mut Reader<'_>) -> (Option<Self>, Vec<ConfigProblem>) {
        let Some(map) = outer.object(KEY) else {
            return (None, Vec::new());
        };
        let mut r = Reader::new(KEY, map);
        r.only("quant_method", "\"fp8\"");
        r.only("fmt", "\"e4m3\"");
        r.also_known(&["activation_scheme", "modules_to_not_convert"]);
        let sizes = r.sizes("weight_block_size");
        let block = sizes.map_or(Some(BLOCK), |sizes| {
            <[usize; 2]>::try_from(sizes)
                .ok()
                .filter(|block| !block.contains(&0))
        });
        if block.is_none() {
            let found = map.get("weight_block_size").unwrap_or(&Value::Null);
            let reason = "it needs two numbers of at least 1: rows and columns".to_owned();
            r.inconsistent("weight_block_size", found, reason);
        }
        let read = Self {
            weight_block_size: block.unwrap_or(BLOCK),
        };
        (Some(read), r.finish())
    }
}

/// A config's content without its quantization: that of the same model with unquantised weights.
pub(crate) fn unquantised(raw: &Map<String, Value>) -> Map<String, Value> {
    let mut raw = raw.clone();
    raw.shift_remove(KEY);
    raw
}
