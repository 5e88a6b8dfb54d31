//! `--json`: written as it is counted, so that memory does not grow with the number of ranks.

use std::io::{BufWriter, Write};

use bridge_core::layout::RankCoord;
use serde::Serialize;

use super::load::Loads;
use crate::report;

/// The form of `--json`; it changes when a key changes its meaning.
const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct Tensor<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [usize],
    /// Names count layers from 0 in each virtual stage; without virtual stages the key is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    vp_stage: Option<usize>,
}

pub(super) fn write(
    (parameters, bytes): (u64, u64),
    ranks: impl Iterator<Item = RankCoord>,
    loads: &mut Loads<'_>,
) -> anyhow::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, report::out());
    let total = serde_json::json!({"parameters": parameters, "bytes": bytes});
    write!(
        out,
        "{{\"schema_version\":{SCHEMA_VERSION},\"total\":{total},\"ranks\":["
    )?;
    for (number, rank) in ranks.enumerate() {
        let load = loads.of(rank)?;
        let head = serde_json::json!({
            "rank": rank.global_rank,
            "tp_rank": rank.tp_rank,
            "cp_rank": rank.cp_rank,
            "dp_rank": rank.dp_rank,
            "pp_rank": rank.pp_rank,
            "ep_rank": rank.ep_rank,
            "etp_rank": rank.etp_rank,
            "edp_rank": rank.edp_rank,
            "parameters": load.parameters(),
            "bytes": load.bytes,
        })
        .to_string();
        let open = head.trim_end_matches('}');
        let comma = if number > 0 { "," } else { "" };
        write!(out, "{comma}{open},\"tensors\":[")?;
        let mut first = true;
        for stage in loads.tensors(rank) {
            let (vp_stage, held) = stage?;
            for tensor in &held {
                if !std::mem::take(&mut first) {
                    out.write_all(b",")?;
                }
                let tensor = Tensor {
                    name: &tensor.name,
                    dtype: tensor.dtype.safetensors_word(),
                    shape: &tensor.shape,
                    vp_stage: (loads.vp_size() > 1).then_some(vp_stage),
                };
                serde_json::to_writer(&mut out, &tensor)?;
            }
        }
        out.write_all(b"]}")?;
    }
    out.write_all(b"]}\n")?;
    out.flush()?;
    Ok(())
}
