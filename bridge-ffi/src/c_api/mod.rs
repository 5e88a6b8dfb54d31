//! The functions of `megatron_bridge.h`.
//!
//! Every function checks its pointers, does its work behind [`crate::error::guard`], and writes its outputs on success only.
//! What each of them owns and may be called with is said in the header; the rules there are the safety conditions here.
#![expect(
    unsafe_code,
    reason = "pointers of C are read and written; each function says which"
)]
#![expect(
    clippy::missing_safety_doc,
    reason = "the rules are those of the header, for all functions alike"
)]

mod checkpoint;
mod errors;
mod export;
mod load;
mod plan;
mod structs;

pub use checkpoint::{
    bridge_checkpoint_free, bridge_checkpoint_layout, bridge_checkpoint_open,
    bridge_checkpoint_plan, bridge_checkpoint_provider_boolean, bridge_checkpoint_provider_integer,
    bridge_checkpoint_provider_json, bridge_checkpoint_provider_number,
    bridge_checkpoint_provider_text,
};
#[cfg(feature = "forced-panic")]
pub use errors::bridge_forced_panic;
pub use errors::{
    CError, bridge_abi_version, bridge_error_free, bridge_error_message, bridge_error_status,
    bridge_string_free, bridge_version,
};
pub use export::{
    bridge_export_discard, bridge_exporter_finish, bridge_exporter_free, bridge_exporter_is_needed,
    bridge_exporter_open, bridge_exporter_plan, bridge_exporter_write,
};
pub use load::{
    bridge_cancellation_cancel, bridge_cancellation_free, bridge_cancellation_new,
    bridge_plan_load, bridge_plan_load_all,
};
pub use plan::{
    CPlan, bridge_plan_find, bridge_plan_free, bridge_plan_place, bridge_plan_size,
    bridge_plan_tensor,
};
pub use structs::{
    CDestination, CExportOptions, CExportState, CLayoutInfo, CLoadOptions, CLoadReport,
    COpenOptions, CParallelLayout, CRankCoord, CRankPlace, CSource, CTensor, ProgressFunction,
};
