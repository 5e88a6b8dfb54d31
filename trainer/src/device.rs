//! Where the model computes.

use bridge_torch::shim::load_cuda;
use tch::{Cuda, Device};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum DeviceError {
    /// The CUDA half of libtorch is not there.
    #[error(
        "device `{device}` needs the CUDA half of libtorch, which does not load: {reason}; install it with `make setup CUDA=1`, or use --device cpu"
    )]
    NoLibrary {
        /// As configured.
        device: String,
        /// The loader's text.
        reason: String,
    },
    /// No such GPU.
    #[error(
        "device `{device}` is not there: libtorch sees {found} GPUs; check the driver with nvidia-smi, or use --device cpu"
    )]
    NoGpu {
        /// As configured.
        device: String,
        /// GPUs that libtorch sees.
        found: i64,
    },
}

/// The words that need no number.
pub(crate) const WORDS: [&str; 3] = ["auto", "cpu", "cuda"];

/// A `--device` flag, when it names a device.
///
/// # Errors
/// What the words are.
pub(crate) fn checked(text: &str) -> Result<String, String> {
    let numbered = text
        .strip_prefix("cuda:")
        .is_some_and(|index| index.parse::<usize>().is_ok());
    if numbered || WORDS.contains(&text) {
        Ok(text.to_owned())
    } else {
        Err(format!("it is none of {}, cuda:N", WORDS.join(", ")))
    }
}

/// The device of the configuration's word: `auto` is the first GPU where there is one, else the CPU.
///
/// # Errors
/// [`DeviceError`] when a GPU was asked for and is not there.
pub(crate) fn resolve(device: &str) -> Result<Device, DeviceError> {
    if device == "cpu" {
        return Ok(Device::Cpu);
    }
    let loaded = load_cuda();
    if device == "auto" {
        let found = loaded.is_ok() && Cuda::is_available();
        return Ok(if found { Device::Cuda(0) } else { Device::Cpu });
    }
    loaded.map_err(|reason| DeviceError::NoLibrary {
        device: device.to_owned(),
        reason,
    })?;
    let index = device
        .strip_prefix("cuda:")
        .and_then(|index| index.parse().ok())
        .unwrap_or(0);
    let found = Cuda::device_count();
    if i64::try_from(index).is_ok_and(|index| index < found) {
        return Ok(Device::Cuda(index));
    }
    Err(DeviceError::NoGpu {
        device: device.to_owned(),
        found,
    })
}

/// `cpu` or `cuda:N`.
#[must_use]
pub(crate) fn name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}").to_lowercase(),
    }
}
