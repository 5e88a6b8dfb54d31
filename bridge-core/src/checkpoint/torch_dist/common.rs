//! Files beside the tensors: common.pt and train_state.pt.

use super::TorchDistProblem;
use super::archive::Archive;
use super::item::{self, ItemError};
use super::pickle::{self, Dialect, Id, Node, Pickle};

/// A value of common.pt as plain data.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Plain {
    /// `None`.
    None,
    /// A truth value.
    Bool(bool),
    /// An integer of up to 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// A text.
    Text(String),
    /// A tuple or list.
    List(Vec<Plain>),
    /// A dict, in its order.
    Dict(Vec<(Plain, Plain)>),
    /// An instance of a class, by the class's full name, with its state; it was never constructed.
    Object(String, Box<Plain>),
    /// Anything else: bytes, larger integers, tensors.
    Opaque,
}

impl Plain {
    /// The value of a text key of a dict or of an instance's state.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Plain> {
        match self {
            Plain::Object(_, state) => state.get(key),
            Plain::Dict(entries) => entries
                .iter()
                .find(|(name, _)| matches!(name, Plain::Text(text) if text == key))
                .map(|(_, value)| value),
            _ => None,
        }
    }
}

/// Values nest no deeper in any file that Megatron writes.
const MAX_DEPTH: usize = 32;

/// Reads common.pt.
pub(super) fn parse(bytes: &[u8], part: &str) -> Result<Plain, TorchDistProblem> {
    read(bytes).map_err(|error| problem(error, part))
}

fn problem(error: ItemError, part: &str) -> TorchDistProblem {
    error
        .into_problem(part)
        .unwrap_or(TorchDistProblem::Archive {
            part: format!("`{part}`"),
            reason: "it is cut short",
        })
}

fn read(bytes: &[u8]) -> Result<Plain, ItemError> {
    let archive = Archive::open(bytes)?;
    let (entry, _) = archive.pickle()?;
    let bytes = archive.read(entry)?;
    let pickle = pickle::parse(&bytes, Dialect::Common)?;
    // Shared values are copied, so that what a file unfolds to is limited by its length too.
    let mut left = bytes.len();
    plain(&pickle, pickle.root(), MAX_DEPTH, &mut left)
}

fn plain(pickle: &Pickle<'_>, id: Id, depth: usize, left: &mut usize) -> Result<Plain, ItemError> {
    let cost = pickle.text(id).map_or(1, |text| text.len().max(1));
    *left = left
        .checked_sub(cost)
        .ok_or(ItemError::Value("it unfolds to more than its own length"))?;
    if depth == 0 {
        return Err(ItemError::Value("its values are nested too deeply"));
    }
    let mut inner = |id: Id| plain(pickle, id, depth - 1, left);
    Ok(match pickle.node(id) {
        Node::None => Plain::None,
        Node::Bool(value) => Plain::Bool(value),
        Node::Int(value) => Plain::Int(value),
        Node::Float(value) => Plain::Float(value),
        Node::Text(_) => Plain::Text(pickle.text(id).unwrap_or_default().to_owned()),
        Node::Tuple(_) | Node::List(_) => {
            let items = pickle.items(id).unwrap_or_default();
            Plain::List(
                items
                    .iter()
                    .map(|id| inner(*id))
                    .collect::<Result<_, _>>()?,
            )
        }
        Node::Dict(_) => {
            let entries = pickle.dict(id).unwrap_or_default();
            let pairs = entries
                .iter()
                .map(|(key, value)| Ok((inner(*key)?, inner(*value)?)));
            Plain::Dict(pairs.collect::<Result<_, ItemError>>()?)
        }
        Node::Object(_) => match pickle.object(id) {
            Some(object) => {
                let (module, name) = pickle.global(object.class).unwrap_or_default();
                let state = object.state.map_or(Ok(Plain::None), inner)?;
                Plain::Object(format!("{module}.{name}"), Box::new(state))
            }
            None => Plain::Opaque,
        },
        Node::BigInt | Node::Bytes(_) | Node::Global(_) | Node::Persistent(_) => Plain::Opaque,
    })
}

/// The iteration that train_state.pt says.
pub(super) fn step_of(bytes: &[u8], part: &str) -> Result<u64, TorchDistProblem> {
    read_step(bytes).map_err(|error| problem(error, part))
}

fn read_step(bytes: &[u8]) -> Result<u64, ItemError> {
    let archive = Archive::open(bytes)?;
    let (entry, folder) = archive.pickle()?;
    let text = archive.read(entry)?;
    let pickle = pickle::parse(&text, Dialect::Tensor)?;
    let wrong = ItemError::Value("its `step` is no positive integer");
    let Some(step) = pickle.get(pickle.root(), "step") else {
        return Err(wrong);
    };
    let stored = item::tensor(&archive, folder, &pickle, step)?;
    let scalar = stored.dtype == crate::Dtype::I64 && stored.shape.iter().all(|size| *size == 1);
    let value = usize::try_from(stored.first)
        .ok()
        .filter(|_| scalar)
        .and_then(|first| bytes.get(first..first + 8))
        .and_then(|bytes| Some(i64::from_le_bytes(bytes.try_into().ok()?)));
    value.and_then(|step| u64::try_from(step).ok()).ok_or(wrong)
}
