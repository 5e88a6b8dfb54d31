//! Models by their Hub id: found in the cache that huggingface_hub and its tools share, or downloaded into it.
//!
//! hf-hub names the parts of the cache and of the Hub's addresses. This room knows names, revisions and files; what is
//! in them is for others. Invariants: nothing that an id, an answer or an index says leads out of the cache; a snapshot
//! links to whole, checked blobs only; a token goes to the endpoint and to nobody else.

mod cache;
#[cfg(feature = "hub")]
mod download;
mod id;
mod locate;

#[cfg(feature = "torch")]
pub(crate) use cache::name_of;
pub(crate) use id::RevisionError;
pub(crate) use locate::{Lookup, Wanted, local};
