//! A checkpoint held against its own record.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::commands::checksums::{self, Checked, Damage};
use crate::report::{self, grouped};

/// The form of `--json`; it changes when a key changes its meaning.
const SCHEMA_VERSION: u32 = 1;
/// Lines that are shown in full.
const SHOWN: usize = 10;

/// Checks `path`, prints what is damaged, and gives whether nothing is.
pub(super) fn run(path: &Path, as_json: bool) -> anyhow::Result<bool> {
    let checked = checksums::check(path)?;
    if as_json {
        json_report(path, &checked)?;
    } else {
        text(&checked)?;
    }
    Ok(checked.damage.is_empty())
}

fn text(checked: &Checked) -> anyhow::Result<()> {
    let mut out = report::out();
    writeln!(out, "record: {}", checked.record.display())?;
    for Damage { kind, name, what } in checked.damage.iter().take(SHOWN) {
        writeln!(out, "{kind} `{name}`: {what}")?;
    }
    let total = checked.damage.len();
    if total > SHOWN {
        writeln!(out, "and {} more", grouped(total - SHOWN))?;
    }
    let verdict = if total == 0 {
        "as recorded"
    } else {
        "not as recorded"
    };
    writeln!(
        out,
        "{verdict}: {} files, {} tensors",
        grouped(checked.files),
        grouped(checked.tensors)
    )?;
    out.flush()?;
    Ok(())
}

fn json_report(path: &Path, checked: &Checked) -> anyhow::Result<()> {
    let damage: Vec<Value> = checked
        .damage
        .iter()
        .map(|Damage { kind, name, what }| json!({"kind": kind, "name": name, "what": what}))
        .collect();
    report::json_line(&json!({
        "schema_version": SCHEMA_VERSION,
        "a": {"path": path.display().to_string()},
        "record": checked.record.display().to_string(),
        "equal": damage.is_empty(),
        "files": checked.files,
        "tensors": checked.tensors,
        "damage": damage,
    }))?;
    Ok(())
}
