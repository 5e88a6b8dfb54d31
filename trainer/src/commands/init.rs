//! `trainer init`: Write a random checkpoint of any size.

use std::f32::consts::TAU;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use bridge_core::Dtype;
use bridge_core::checkpoint::Overwrite;
use bridge_core::checkpoint::hf::{HfLayout, HfWriter};
use bridge_core::checkpoint::{TensorInfo, TensorSink};
use bridge_core::config::HfConfig;
use bridge_core::mapping::{HfParameter, Init, Part, Stored};
use bridge_core::models;
use bytesize::ByteSize;
use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::interrupt::Interrupt;
use crate::hub::{self, Lookup, Wanted};

/// Elements that one thread makes at a time; also the length of one random stream, so results do not depend on threads.
const CHUNK: usize = 1 << 20;

/// Write a random checkpoint of any size.
///
/// Tensors are named, shaped and stored as the hub does it: packed experts, A_log and linear_attn.norm in float32.
/// The same seed gives the same bytes, whatever the number of threads.
///
/// Example: trainer init --config config.json --output tiny/ --seed 0 --dtype bfloat16
#[derive(Debug, clap::Args)]
pub(crate) struct InitArgs {
    /// A config.json of any name, or a directory or Hub id of a model that has one.
    #[arg(long, value_name = "MODEL")]
    config: PathBuf,
    /// The directory to make.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Seed of all randomness.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// bfloat16, float16 or float32; the config's own without it.
    #[arg(long, value_name = "DTYPE", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
    /// Largest file, as 5GB or 500MB.
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: ByteSize,
    /// Replace what is at the output.
    #[arg(long)]
    overwrite: bool,
}

pub(super) fn parse_dtype(word: &str) -> Result<Dtype, String> {
    match word.parse() {
        Ok(dtype @ (Dtype::Bf16 | Dtype::F16 | Dtype::F32)) => Ok(dtype),
        _ => Err("choose bfloat16, float16 or float32".to_owned()),
    }
}

pub(crate) fn run(args: &InitArgs) -> anyhow::Result<ExitCode> {
    let config = hub::local(&args.config, Wanted::Config, &Lookup::default())?;
    let file = if config.is_dir() {
        config.join("config.json")
    } else {
        config.into_owned()
    };
    let config = HfConfig::from_file(&file)?;
    let dtype = args.dtype.or(config.text.dtype).unwrap_or(Dtype::F32);
    let registry = models::registry(&config)?;
    let tensors: Vec<(String, TensorInfo)> = registry
        .hf_parameters()
        .map(|(name, parameter)| {
            let dtype = match parameter.stored {
                Stored::AsModel => dtype,
                Stored::Float32 => Dtype::F32,
            };
            let shape = parameter.shape.clone();
            (name.to_owned(), TensorInfo { dtype, shape })
        })
        .collect();
    check_sizes(&tensors)?;
    let layout = HfLayout::sharded(tensors, args.max_shard_size.as_u64().max(1));
    tracing::info!(
        "{} tensors, {} in {} files, to {}",
        layout.tensors().count(),
        ByteSize(layout.num_bytes()),
        layout.files.len(),
        args.output.display()
    );
    let overwrite = Overwrite::from(args.overwrite);
    let started = std::time::Instant::now();
    let interrupt = Interrupt::listen()?;
    let writer = HfWriter::create(&layout, &args.output, overwrite)?;
    for (name, info) in layout.tensors() {
        let parameter = registry
            .hf_parameter(name)
            .expect("the layout is made of the registry's names");
        let source = Noise::new(args.seed, name, parameter, &config);
        source
            .write(name, info, &interrupt.sink(&writer))
            .with_context(|| format!("write {}", args.output.display()))?;
    }
    let mut written = config.clone();
    written.set_dtype(dtype);
    written.drop_quantization();
    writer.write_file("config.json", written.to_json().as_bytes())?;
    let output = writer.finish()?;
    tracing::info!(
        "wrote {} in {:.1} s",
        output.display(),
        started.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}

/// Sizes in a config come from a user; their products must be countable before any file is made.
fn check_sizes(tensors: &[(String, TensorInfo)]) -> anyhow::Result<()> {
    let mut total = 0u64;
    for (name, info) in tensors {
        let bytes = info
            .shape
            .iter()
            .try_fold(info.dtype.size_bytes() as u64, |bytes, dim| {
                bytes.checked_mul(*dim as u64)
            });
        total = bytes
            .and_then(|bytes| total.checked_add(bytes))
            .filter(|total| *total < 1 << 60)
            .with_context(|| {
                format!(
                    "`{name}` with shape {:?} is larger than any disk; is the config right?",
                    info.shape
                )
            })?;
    }
    Ok(())
}

/// The values of one tensor.
struct Noise {
    key: [u8; 32],
    init: Init,
    std: f32,
}

impl Noise {
    fn new(seed: u64, name: &str, parameter: &HfParameter, config: &HfConfig) -> Self {
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(name.as_bytes());
        let std = match (parameter.part, &config.vision) {
            (Part::Vision | Part::Projector, Some(vision)) => vision.initializer_range,
            _ => config.text.initializer_range,
        };
        Self {
            key: hash.finalize().into(),
            init: parameter.init,
            #[expect(
                clippy::cast_possible_truncation,
                reason = "a standard deviation in float32"
            )]
            std: std as f32,
        }
    }

    /// Streams the tensor to the writer, a chunk a thread at a time.
    fn write(&self, name: &str, info: &TensorInfo, sink: &dyn TensorSink) -> anyhow::Result<()> {
        let numel = info.numel();
        let size = info.dtype.size_bytes();
        (0..numel.div_ceil(CHUNK))
            .into_par_iter()
            .try_for_each_init(Vec::new, |bytes: &mut Vec<u8>, chunk| {
                let start = chunk * CHUNK;
                let count = CHUNK.min(numel - start);
                bytes.clear();
                bytes.reserve(count * size);
                self.fill(chunk as u64, count, info.dtype, bytes);
                sink.write(name, (start * size) as u64, bytes)
            })?;
        Ok(())
    }

    fn fill(&self, stream: u64, count: usize, dtype: Dtype, bytes: &mut Vec<u8>) {
        let mut push = |value: f32| match dtype {
            Dtype::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            Dtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            _ => bytes.extend(value.to_le_bytes()),
        };
        let mut rng = ChaCha8Rng::from_seed(self.key);
        rng.set_stream(stream);
        match self.init {
            Init::Zeros => (0..count).for_each(|_| push(0.0)),
            Init::Ones => (0..count).for_each(|_| push(1.0)),
            // Drawn and taken the logarithm of in float32; a 16-bit draw can be 0, and its logarithm kills the head.
            Init::ALog => (0..count).for_each(|_| {
                let uniform = 0.01 + 15.99 * unit(&mut rng);
                push(uniform.ln());
            }),
            Init::Normal => {
                for pair in 0..count.div_ceil(2) {
                    let (first, second) = normal_pair(&mut rng);
                    push(self.std * first);
                    if 2 * pair + 1 < count {
                        push(self.std * second);
                    }
                }
            }
        }
    }
}

/// Uniform in (0, 1].
fn unit(rng: &mut ChaCha8Rng) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "24 bits are exact in float32")]
    let steps = ((rng.next_u32() >> 8) + 1) as f32;
    steps / (1 << 24) as f32
}

/// Two independent standard normal values (Box and Muller, 1958).
fn normal_pair(rng: &mut ChaCha8Rng) -> (f32, f32) {
    let radius = (-2.0 * unit(rng).ln()).sqrt();
    let (sin, cos) = (TAU * unit(rng)).sin_cos();
    (radius * cos, radius * sin)
}
