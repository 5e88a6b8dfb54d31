//! What a comparison found, as text and as JSON.

use std::io::Write;

use bridge_core::convert::{Comparison, Difference, Element, Side};
use bytesize::ByteSize;
use serde_json::{Value, json};

use super::compare::Outcome;
use crate::commands::checkpoint::Checkpoint;
use crate::report::{self, grouped};

/// The form of `--json`; it changes when a key changes its meaning.
const SCHEMA_VERSION: u32 = 1;
/// Differences that are shown in full.
const SHOWN: usize = 10;

/// Prints both sides, the first differences, what was passed over, and the result.
pub(super) fn text(a: &Checkpoint, b: &Checkpoint, outcome: &Outcome) -> anyhow::Result<()> {
    let mut out = report::out();
    for (letter, side) in [("A", a), ("B", b)] {
        writeln!(out, "{letter}: {}, {}", side.path().display(), side.kind())?;
    }
    let comparison = &outcome.comparison;
    let total = differences(&mut out, comparison, outcome.a, &outcome.damaged)?;
    let tolerated = &outcome.tolerated;
    let padding = usize::try_from(comparison.padding).unwrap_or(usize::MAX);
    for (count, what) in [
        (padding, "elements of padding rows"),
        (tolerated.optimizer_states, "tensors of an optimizer"),
        (tolerated.extra_states, "extra states of modules"),
        (
            tolerated.left_out,
            "tensors of the multi-token-prediction head, which is left out",
        ),
    ] {
        if count > 0 {
            writeln!(out, "not compared: {} {what}", grouped(count))?;
        }
    }
    verdict(&mut out, comparison, total)?;
    out.flush()?;
    Ok(())
}

/// Prints the first differences and the result of a comparison whose sides need no names.
pub(super) fn comparison_alone(comparison: &Comparison, a: Side) -> anyhow::Result<()> {
    let mut out = report::out();
    let total = differences(&mut out, comparison, a, &[])?;
    verdict(&mut out, comparison, total)?;
    out.flush()?;
    Ok(())
}

/// Prints the first differences, and gives how many there are.
fn differences(
    out: &mut impl Write,
    comparison: &Comparison,
    a: Side,
    damaged: &[String],
) -> anyhow::Result<usize> {
    let lines = comparison
        .differences
        .iter()
        .map(|difference| line(difference, a))
        .chain(damaged.iter().cloned());
    for line in lines.take(SHOWN) {
        writeln!(out, "{line}")?;
    }
    let total = comparison.differences.len() + damaged.len();
    if total > SHOWN {
        writeln!(out, "and {} more", grouped(total - SHOWN))?;
    }
    Ok(total)
}

fn verdict(out: &mut impl Write, comparison: &Comparison, total: usize) -> anyhow::Result<()> {
    let verdict = match total {
        0 => "equal".to_owned(),
        1 => "1 difference".to_owned(),
        _ => format!("{} differences", grouped(total)),
    };
    writeln!(
        out,
        "{verdict}: {} tensors compared, {}",
        grouped(comparison.tensors),
        ByteSize(comparison.bytes)
    )?;
    Ok(())
}

fn line(difference: &Difference, a: Side) -> String {
    match difference {
        Difference::Missing { name, from } => format!("`{name}`: missing in {}", letter(*from, a)),
        Difference::Shape {
            name,
            source,
            other,
        } => {
            let (in_a, in_b) = sorted(source, other, a);
            format!("`{name}`: shape {in_a:?} in A, {in_b:?} in B")
        }
        Difference::Dtype {
            name,
            source,
            other,
        } => {
            let (in_a, in_b) = sorted(source, other, a);
            format!(
                "`{name}`: dtype {in_a} in A, {in_b} in B; --torch-dtype says in which to compare"
            )
        }
        Difference::Values {
            name,
            elements,
            of,
            index,
            source,
            other,
            max_distance,
        } => {
            let (in_a, in_b) = sorted(source, other, a);
            format!(
                "`{name}`: {elements} of {of} values differ, by at most {max_distance:.1e}, first at {index:?}: {in_a} in A, {in_b} in B"
            )
        }
        other => format!("`{}` differs", other.name()),
    }
}

fn letter(side: Side, a: Side) -> &'static str {
    if side == a { "A" } else { "B" }
}

/// A's and B's of what the source and the other side have.
fn sorted<T>(source: T, other: T, a: Side) -> (T, T) {
    match a {
        Side::Source => (source, other),
        Side::Other => (other, source),
    }
}

/// Prints everything.
pub(super) fn json(a: &Checkpoint, b: &Checkpoint, outcome: &Outcome) -> anyhow::Result<()> {
    let side =
        |side: &Checkpoint| json!({"path": side.path().display().to_string(), "kind": side.kind()});
    let comparison = &outcome.comparison;
    let tolerated = &outcome.tolerated;
    let differences: Vec<Value> = comparison
        .differences
        .iter()
        .map(|difference| difference_json(difference, outcome.a))
        .collect();
    report::json_line(&json!({
        "schema_version": SCHEMA_VERSION,
        "a": side(a),
        "b": side(b),
        "equal": outcome.is_equal(),
        "tensors": comparison.tensors,
        "bytes": comparison.bytes,
        "differences": differences,
        "damaged": outcome.damaged,
        "not_compared": {
            "padding_elements": comparison.padding,
            "optimizer_tensors": tolerated.optimizer_states,
            "extra_states": tolerated.extra_states,
            "left_out": tolerated.left_out,
        },
    }))?;
    Ok(())
}

fn difference_json(difference: &Difference, a: Side) -> Value {
    match difference {
        Difference::Missing { name, from } => {
            json!({"kind": "missing", "tensor": name, "from": letter(*from, a).to_lowercase()})
        }
        Difference::Shape {
            name,
            source,
            other,
        } => {
            let (in_a, in_b) = sorted(source, other, a);
            json!({"kind": "shape", "tensor": name, "a": in_a, "b": in_b})
        }
        Difference::Dtype {
            name,
            source,
            other,
        } => {
            let (in_a, in_b) = sorted(source, other, a);
            json!({"kind": "dtype", "tensor": name, "a": in_a.to_string(), "b": in_b.to_string()})
        }
        Difference::Values {
            name,
            elements,
            of,
            index,
            source,
            other,
            max_distance,
        } => {
            let (in_a, in_b) = sorted(source, other, a);
            // Numbers that JSON does not have are null.
            json!({
                "kind": "values",
                "tensor": name,
                "elements": elements,
                "of": of,
                "index": index,
                "a": element_json(in_a),
                "b": element_json(in_b),
                "max_distance": max_distance,
            })
        }
        other => json!({"kind": "other", "tensor": other.name()}),
    }
}

fn element_json(element: &Element) -> Value {
    json!({
        "value": element.value,
        "bits": format!("0x{:0digits$x}", element.bits, digits = element.dtype.size_bytes() * 2),
    })
}
