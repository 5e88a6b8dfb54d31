//! The parameters: Megatron names over libtorch tensors.
//!
//! The experts of a layer live in one stacked tensor (`...experts.linear_fc1.weight`, `[experts, 2 I, hidden]`); the
//! Megatron names `...experts.linear_fc1.weight{x}` are its slices, for loading and saving. Loading carries a plan out
//! into this memory, saving the inverse plan out of it.
//!
//! Invariant: a parameter's memory stays where it is. Blocks and optimizers hold views of it and write in place.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bridge_core::Dtype;
use bridge_core::checkpoint::{CheckpointError, TensorInfo, TensorSink, TensorSource};
use bridge_core::plan::{ModelPlan, TensorPlan};
use indexmap::IndexMap;
use tch::{Device, Kind, TchError, Tensor};

use crate::model::ModelError;

/// The part of the model that a parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The vision tower without its merger.
    Vision,
    /// The merger, which makes language-model tokens of patches.
    Projector,
    /// Embedding, decoder and output layer.
    Language,
    /// The multi-token prediction head.
    Mtp,
}

impl Part {
    /// The part of a parameter by its Megatron name.
    #[must_use]
    pub fn of(megatron_name: &str) -> Self {
        let name = megatron_name;
        if name.starts_with("vision_model.merger.")
            || name.starts_with("vision_model.decoder.deepstack_merger_list.")
        {
            Self::Projector
        } else if name.starts_with("vision_model.") {
            Self::Vision
        } else if name.starts_with("language_model.mtp.") || name.starts_with("mtp.") {
            Self::Mtp
        } else {
            Self::Language
        }
    }
}

/// All parameters of a model.
#[derive(Debug)]
pub struct ParamStore {
    params: IndexMap<String, Tensor>,
    slots: HashMap<String, Slot>,
}

/// Where the tensor of a Megatron name lies.
#[derive(Debug, Clone)]
struct Slot {
    /// Index into `params`.
    param: usize,
    /// First element within it.
    start: usize,
    info: TensorInfo,
}

impl ParamStore {
    /// Makes room on the CPU for every target of `plan`, `experts` to a stacked tensor.
    pub(crate) fn allocate(plan: &ModelPlan, experts: usize) -> Result<Self, ModelError> {
        let mut params: IndexMap<String, Tensor> = IndexMap::new();
        let mut slots = HashMap::new();
        for tensor in &plan.tensors {
            let (name, place) = stacked_name(tensor);
            let mut size: Vec<i64> = Vec::with_capacity(tensor.shape.len() + 1);
            if place.is_some() {
                size.push(to_i64(experts));
            }
            size.extend(tensor.shape.iter().map(|&length| to_i64(length)));
            let param = match params.get_index_of(name) {
                Some(index) => index,
                None => {
                    let fresh = Tensor::f_empty(&size[..], (kind_of(tensor.dtype)?, Device::Cpu))?;
                    params.insert_full(name.to_owned(), fresh).0
                }
            };
            let slot = Slot {
                param,
                start: place.unwrap_or(0) * tensor.numel(),
                info: TensorInfo {
                    dtype: tensor.dtype,
                    shape: tensor.shape.clone(),
                },
            };
            slots.insert(tensor.name.clone(), slot);
        }
        Ok(Self { params, slots })
    }

    /// The tensor of a parameter (stacked for experts), sharing its memory.
    ///
    /// # Errors
    /// [`ModelError::MissingParameter`].
    pub fn get(&self, name: &str) -> Result<Tensor, ModelError> {
        self.params
            .get(name)
            .map(Tensor::shallow_clone)
            .ok_or_else(|| ModelError::MissingParameter {
                name: name.to_owned(),
            })
    }

    /// Names and tensors in plan order; experts stacked.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.params
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The stacked parameter that holds the tensor of a Megatron name (`...weight3` gives `...weight`).
    #[must_use]
    pub fn holder_of(&self, megatron_name: &str) -> Option<&str> {
        let slot = self.slots.get(megatron_name)?;
        let (name, _) = self.params.get_index(slot.param)?;
        Some(name)
    }

    /// Lets gradients reach exactly the parameters that `trainable` answers true for.
    pub fn set_trainable(&self, trainable: impl Fn(&str) -> bool) {
        for (name, tensor) in &self.params {
            // A leaf's flag lives in the tensor itself, which the blocks' views share.
            let _ = tensor.set_requires_grad(trainable(name));
        }
    }

    /// Drops every gradient.
    pub fn clear_grads(&self) {
        for tensor in self.params.values() {
            let mut tensor = tensor.shallow_clone();
            tensor.zero_grad();
        }
    }

    /// Elements of all parameters.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.params.values().map(Tensor::numel).sum()
    }

    /// Moves every parameter to `device`.
    pub(crate) fn move_to(&mut self, device: Device) -> Result<(), TchError> {
        for tensor in self.params.values_mut() {
            *tensor = tensor.f_to_device(device)?;
        }
        Ok(())
    }

    /// The parameters as a place that plans write into.
    ///
    /// A mutex a tensor makes the writes of several threads safe; they touch different bytes, so it is rarely waited for.
    pub(crate) fn memory(&self) -> ParamMemory<'_> {
        self.memory_of(Tensor::shallow_clone)
    }

    /// The gradients in place of the parameters (`None` where there is none); reads give zeros there.
    pub(crate) fn gradients(&self) -> ParamMemory<'_> {
        self.memory_of(|tensor| {
            let grad = tensor.grad();
            if grad.defined() {
                grad
            } else {
                tensor.detach().zeros_like()
            }
        })
    }

    fn memory_of(&self, tensor: impl Fn(&Tensor) -> Tensor) -> ParamMemory<'_> {
        let flat = |param: &Tensor| {
            let tensor = tensor(param).detach().to_device(Device::Cpu).contiguous();
            Mutex::new(tensor.view([-1]))
        };
        ParamMemory {
            slots: &self.slots,
            tensors: self.params.values().map(flat).collect(),
        }
    }
}

/// The stacked tensor's name and the expert's place in it.
fn stacked_name(tensor: &TensorPlan) -> (&str, Option<usize>) {
    let stacked = tensor.expert.and_then(|expert| {
        let name = tensor.name.strip_suffix(&expert.to_string())?;
        name.ends_with(".weight").then_some((name, Some(expert)))
    });
    stacked.unwrap_or((&tensor.name, None))
}

/// libtorch's name of a dtype that parameters may have.
pub(crate) fn kind_of(dtype: Dtype) -> Result<Kind, ModelError> {
    match dtype {
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F64 => Ok(Kind::Double),
        Dtype::Bf16 => Ok(Kind::BFloat16),
        other => Err(ModelError::Unsupported {
            what: "a parameter's dtype",
            found: other.to_string(),
        }),
    }
}

fn to_i64(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Bytes of all parameters (or of their gradients) under Megatron names.
#[derive(Debug)]
pub(crate) struct ParamMemory<'a> {
    slots: &'a HashMap<String, Slot>,
    /// Flat, on the CPU.
    tensors: Vec<Mutex<Tensor>>,
}

impl ParamMemory<'_> {
    /// Runs `job` on the elements behind a byte range of a tensor.
    fn with_range(
        &self,
        name: &str,
        offset: u64,
        len: usize,
        action: &'static str,
        job: impl FnOnce(Tensor, Kind) -> Result<(), TchError>,
    ) -> Result<(), CheckpointError> {
        let slot = self
            .slots
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor {
                name: name.to_owned(),
            })?;
        let size = slot.info.dtype.size_bytes();
        let end = offset.saturating_add(len as u64);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if end > slot.info.num_bytes() || !start.is_multiple_of(size) || !len.is_multiple_of(size) {
            return Err(CheckpointError::Range {
                name: name.to_owned(),
                start: offset,
                end,
                num_bytes: slot.info.num_bytes(),
            });
        }
        let tensor = self.tensors[slot.param]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        tensor
            .f_narrow(0, to_i64(slot.start + start / size), to_i64(len / size))
            .and_then(|range| job(range, tensor.kind()))
            .map_err(|source| CheckpointError::Foreign {
                name: name.to_owned(),
                action,
                source: Box::new(source),
            })
    }
}

impl TensorSink for ParamMemory<'_> {
    fn write(&self, name: &str, offset_bytes: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.with_range(
            name,
            offset_bytes,
            bytes.len(),
            "written",
            |mut range, kind| range.f_copy_(&Tensor::f_from_data_size(bytes, &range.size(), kind)?),
        )
    }
}

impl TensorSource for ParamMemory<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.slots.get(name).map(|slot| slot.info.clone())
    }

    fn read(&self, name: &str, offset_bytes: u64, into: &mut [u8]) -> Result<(), CheckpointError> {
        self.with_range(name, offset_bytes, into.len(), "read", |range, _| {
            let numel = range.numel();
            range.f_copy_data_u8(into, numel)
        })
    }
}
