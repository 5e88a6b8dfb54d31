//! Pickles, read as plain data.
//!
//! The machine knows the instructions that torch and Megatron-Core write and the names that their files hold, and
//! nothing else: an instruction or a name off the lists is an error. Nothing is imported, constructed or called; a
//! class stays a name, and an instance is that name with what would have been passed to it.
//!
//! The values of a pickle of `n` bytes take at most `32 n + 64 KiB` of memory beside its text; the machine stops before
//! more.

mod allow;
mod machine;
mod node;
mod write;

pub(super) use allow::{Dialect, STORAGES};
pub(super) use machine::parse;
pub(super) use node::{Id, Node, Object, Pickle};
pub(super) use write::PickleWriter;

/// Why a pickle is refused. Offsets count from its first byte.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PickleProblem {
    /// It ends inside an instruction, or without its last one.
    #[error(
        "the pickle ends at byte {offset}, before its last instruction; the copy or download was cut short"
    )]
    Cut {
        /// Bytes that are there.
        offset: usize,
    },
    /// An instruction off the list.
    #[error(
        "the pickle has the instruction 0x{opcode:02x} at byte {offset}, which no checkpoint needs"
    )]
    Opcode {
        /// Where.
        offset: usize,
        /// The instruction.
        opcode: u8,
    },
    /// A name off the list.
    #[error(
        "the pickle names `{module}.{name}` at byte {offset}, which is not on the list of harmless names for this file"
    )]
    Global {
        /// Where.
        offset: usize,
        /// The module.
        module: String,
        /// The name in it.
        name: String,
    },
    /// An instruction whose operands are not what it needs.
    #[error("the pickle is malformed at byte {offset}: {reason}")]
    Malformed {
        /// Where.
        offset: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// Far more values than its length explains.
    #[error("the pickle packs more values into its {len} bytes than any checkpoint does")]
    Dense {
        /// Its length.
        len: usize,
    },
    /// Longer than any checkpoint's.
    #[error("the pickle has {len} bytes, the limit is {limit}")]
    TooLong {
        /// Its length.
        len: u64,
        /// The limit.
        limit: u64,
    },
}
