//! A checkpoint in block-wise FP8, made of one in float32 by plain formulas, beside what it should read as.

use std::path::{Path, PathBuf};

use bridge_core::Dtype;
use bridge_core::checkpoint::hf::{HfCheckpoint, HfLayout, HfWriter};
use bridge_core::checkpoint::{Overwrite, TensorInfo, TensorSink};
use serde_json::{Value, json};

use crate::tensors::{Tensors, read_all};

/// Directories of one model.
#[derive(Debug)]
pub struct Fp8 {
    /// Its matrices in FP8 with scales.
    pub quantised: PathBuf,
    /// Those matrices as float32: value x scale, no rounding after the product.
    pub float32: PathBuf,
    /// Those matrices as bfloat16, rounded once from float32.
    pub bfloat16: PathBuf,
}

/// How a test checkpoint is quantised.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// F32 or BF16.
    pub scales: Dtype,
    /// Largest file.
    pub max_shard_bytes: u64,
}

impl Default for Form {
    fn default() -> Self {
        Self {
            block: [128, 128],
            scales: Dtype::F32,
            max_shard_bytes: 100_000,
        }
    }
}

/// Quantises the projections of a float32 checkpoint, as hub checkpoints have it: no embedding, norm or convolution.
pub fn directories(source: &Path, scratch: &Path, form: Form) -> Fp8 {
    let mut config: Value =
        serde_json::from_slice(&fs_err::read(source.join("config.json")).unwrap()).unwrap();
    let (mut quantised, mut float32, mut bfloat16) = (Vec::new(), Vec::new(), Vec::new());
    for (name, info, bytes) in read_all(&HfCheckpoint::open(source).unwrap()) {
        if !(name.ends_with("_proj.weight") && info.shape.len() == 2) {
            for list in [&mut quantised, &mut float32, &mut bfloat16] {
                list.push((name.clone(), info.clone(), bytes.clone()));
            }
            continue;
        }
        assert_eq!(info.dtype, Dtype::F32);
        let shape = [info.shape[0], info.shape[1]];
        let of = |dtype, shape: &[usize]| TensorInfo {
            dtype,
            shape: shape.to_vec(),
        };
        let (codes, scales) = quantise(&bytes, shape, form);
        let scale_shape = [
            shape[0].div_ceil(form.block[0]),
            shape[1].div_ceil(form.block[1]),
        ];
        let values: Vec<f32> = (0..shape[0] * shape[1])
            .map(|at| {
                let (row, column) = (at / shape[1], at % shape[1]);
                let place = row / form.block[0] * scale_shape[1] + column / form.block[1];
                decode(codes[at]) * scales[place]
            })
            .collect();
        let wide = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let narrow = values.iter().flat_map(|v| bfloat16_bits(*v).to_le_bytes());
        float32.push((name.clone(), of(Dtype::F32, &shape), wide));
        bfloat16.push((name.clone(), of(Dtype::Bf16, &shape), narrow.collect()));
        quantised.push((name.clone(), of(Dtype::F8E4M3, &shape), codes));
        let scale_bytes = match form.scales {
            Dtype::F32 => scales.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => scales
                .iter()
                .flat_map(|v| bfloat16_bits(*v).to_le_bytes())
                .collect(),
        };
        let name = format!("{name}_scale_inv");
        quantised.push((name, of(form.scales, &scale_shape), scale_bytes));
    }
    let made = Fp8 {
        quantised: scratch.join("fp8"),
        float32: scratch.join("float32"),
        bfloat16: scratch.join("bfloat16"),
    };
    write(&float32, &config, &made.float32, form.max_shard_bytes);
    write(&bfloat16, &config, &made.bfloat16, form.max_shard_bytes);
    config["quantization_config"] = json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "modules_to_not_convert": ["lm_head"], "weight_block_size": form.block,
    });
    write(&quantised, &config, &made.quantised, form.max_shard_bytes);
    made
}

/// Writes a directory.
pub fn write(tensors: &Tensors, config: &Value, target: &Path, max_shard_bytes: u64) {
    let infos = tensors
        .iter()
        .map(|(name, info, _)| (name.clone(), info.clone()))
        .collect();
    let layout = HfLayout::sharded(infos, max_shard_bytes);
    let writer = HfWriter::create(&layout, target, Overwrite::No).unwrap();
    for (name, _, bytes) in tensors {
        writer.write(name, 0, bytes).unwrap();
    }
    writer
        .write_file("config.json", config.to_string().as_bytes())
        .unwrap();
    writer.finish().unwrap();
}

/// Codes and one scale a block: its largest magnitude becomes 448, the largest value of the format.
fn quantise(bytes: &[u8], [rows, columns]: [usize; 2], form: Form) -> (Vec<u8>, Vec<f32>) {
    let value = |row: usize, column: usize| {
        let at = 4 * (row * columns + column);
        f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    };
    let mut codes = vec![0; rows * columns];
    let mut scales = Vec::new();
    for top in (0..rows).step_by(form.block[0]) {
        for left in (0..columns).step_by(form.block[1]) {
            let places = || {
                (top..rows.min(top + form.block[0])).flat_map(move |row| {
                    (left..columns.min(left + form.block[1])).map(move |column| (row, column))
                })
            };
            let largest = places().map(|(r, c)| value(r, c).abs()).fold(0.0, f32::max);
            let mut scale = largest / 448.0;
            if form.scales == Dtype::Bf16 {
                scale = f32::from_bits(u32::from(bfloat16_bits(scale)) << 16);
            }
            for (row, column) in places() {
                codes[row * columns + column] = encode(value(row, column) / scale);
            }
            scales.push(scale);
        }
    }
    (codes, scales)
}

/// The value of a code: sign, 4 bits of exponent (bias 7), 3 of mantissa.
fn decode(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 128 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// The code of the nearest value, NaN aside.
fn encode(value: f32) -> u8 {
    (0..=255)
        .filter(|code| code & 0x7f != 0x7f)
        .min_by(|a, b| {
            let far = |code: &u8| (decode(*code) - value).abs();
            far(a).total_cmp(&far(b))
        })
        .unwrap()
}

/// The nearest bfloat16, ties to even, on the bits.
fn bfloat16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    u16::try_from((bits + 0x7fff + (bits >> 16 & 1)) >> 16).unwrap()
}
