//! Distances as tables and as JSON.

use std::io::Write;

use bridge_core::convert::Distance;
use serde_json::{Value, json};

use super::measure::{Measured, Place, Row};
use crate::commands::checkpoint::Checkpoint;
use crate::report::{self, grouped, table};

/// The form of `--json`; it changes when a key changes its meaning.
const SCHEMA_VERSION: u32 = 1;
/// Tensors without a counterpart that are shown.
const SHOWN: usize = 10;

/// Prints groups, the tensors furthest apart, and what cannot be measured.
pub(super) fn text(
    a: &Checkpoint,
    b: &Checkpoint,
    measured: &Measured,
    limit: usize,
) -> anyhow::Result<()> {
    let mut out = report::out();
    for (letter, side) in [("A", a), ("B", b)] {
        writeln!(out, "{letter}: {}, {}", side.path().display(), side.kind())?;
    }
    let groups = measured.groups();
    if !groups.is_empty() {
        let header = ["part", "layer", "tensors", "relative", "max abs", "cosine"];
        let mut rows = table(&header, &[1, 2, 3, 4, 5]);
        for (place, group) in &groups {
            let [part, layer] = words(place);
            let [relative, max_abs, cosine] = numbers(&group.distance);
            let tensors = grouped(group.tensors);
            rows.add_row([part, layer, tensors, relative, max_abs, cosine]);
        }
        writeln!(out, "\n{rows}")?;
    }
    let changed = |row: &&Row| row.distance.changed > 0;
    let header = ["tensor", "relative", "max abs", "cosine", "changed", "of"];
    let mut rows = table(&header, &[1, 2, 3, 4, 5]);
    for row in measured.rows.iter().filter(changed).take(limit) {
        let [relative, max_abs, cosine] = numbers(&row.distance);
        let count = |count: u64| grouped(usize::try_from(count).unwrap_or(usize::MAX));
        rows.add_row([
            row.name.clone(),
            relative,
            max_abs,
            cosine,
            count(row.distance.changed),
            count(row.distance.elements),
        ]);
    }
    let total = measured.rows.iter().filter(changed).count();
    if total > 0 && limit > 0 {
        writeln!(out, "\n{rows}")?;
        if total > limit {
            writeln!(
                out,
                "and {} more; --limit {total} shows all",
                grouped(total - limit)
            )?;
        }
    }
    writeln!(out)?;
    let alone = measured
        .missing
        .iter()
        .map(|(name, letter)| format!("`{name}`: missing in {letter}"));
    let misshapen = measured
        .misshapen
        .iter()
        .map(|(name, in_a, in_b)| format!("`{name}`: shape {in_a:?} in A, {in_b:?} in B"));
    for line in alone.chain(misshapen).take(SHOWN) {
        writeln!(out, "{line}")?;
    }
    let unmeasured = measured.missing.len() + measured.misshapen.len();
    if unmeasured > SHOWN {
        writeln!(out, "and {} more", grouped(unmeasured - SHOWN))?;
    }
    let all = measured.total();
    if all.non_finite > 0 {
        writeln!(
            out,
            "{} differences are infinite or no number and are not in the sums",
            all.non_finite
        )?;
    }
    let [relative, max_abs, _] = numbers(&all);
    if measured.is_equal() {
        writeln!(out, "equal: {} tensors", grouped(measured.rows.len()))?;
    } else {
        writeln!(
            out,
            "{} of {} tensors differ: relative {relative}, max abs {max_abs}",
            grouped(total),
            grouped(measured.rows.len())
        )?;
    }
    out.flush()?;
    Ok(())
}

fn words(place: &Place) -> [String; 2] {
    [
        place.part.map_or("", |part| part.word()).to_owned(),
        place.layer.map_or(String::new(), |layer| layer.to_string()),
    ]
}

/// Relative norm, largest difference, cosine.
fn numbers(distance: &Distance) -> [String; 3] {
    [
        format!("{:.3e}", distance.relative()),
        format!("{:.3e}", distance.max_abs),
        distance
            .cosine()
            .map_or("-".to_owned(), |cosine| format!("{cosine:.6}")),
    ]
}

/// Prints everything.
pub(super) fn json(a: &Checkpoint, b: &Checkpoint, measured: &Measured) -> anyhow::Result<()> {
    let side =
        |side: &Checkpoint| json!({"path": side.path().display().to_string(), "kind": side.kind()});
    let groups: Vec<Value> = measured
        .groups()
        .iter()
        .map(|(place, group)| {
            let mut value = distance_json(&group.distance);
            value["part"] = place.part.map(|part| part.word()).into();
            value["layer"] = place.layer.into();
            value["tensors"] = group.tensors.into();
            value
        })
        .collect();
    let tensors: Vec<Value> = measured
        .rows
        .iter()
        .map(|row| {
            let mut value = distance_json(&row.distance);
            value["name"] = row.name.as_str().into();
            value["part"] = row.place.part.map(|part| part.word()).into();
            value["layer"] = row.place.layer.into();
            value["shape"] = row.shape.clone().into();
            value["dtype_a"] = row.dtypes.0.to_string().into();
            value["dtype_b"] = row.dtypes.1.to_string().into();
            value
        })
        .collect();
    let missing = |letter: &str| -> Vec<&str> {
        let missing = measured.missing.iter();
        missing
            .filter(|(_, from)| *from == letter)
            .map(|(name, _)| name.as_str())
            .collect()
    };
    let misshapen: Vec<Value> = measured
        .misshapen
        .iter()
        .map(|(name, in_a, in_b)| json!({"name": name, "a": in_a, "b": in_b}))
        .collect();
    report::json_line(&json!({
        "schema_version": SCHEMA_VERSION,
        "a": side(a),
        "b": side(b),
        "equal": measured.is_equal(),
        "total": distance_json(&measured.total()),
        "groups": groups,
        "tensors": tensors,
        "missing_in_a": missing("A"),
        "missing_in_b": missing("B"),
        "misshapen": misshapen,
    }))?;
    Ok(())
}

/// Numbers that JSON does not have are null.
fn distance_json(distance: &Distance) -> Value {
    json!({
        "relative": distance.relative(),
        "max_abs": distance.max_abs,
        "cosine": distance.cosine(),
        "changed": distance.changed,
        "elements": distance.elements,
        "non_finite": distance.non_finite,
        "norm_a": distance.squared_a.sqrt(),
        "norm_b": distance.squared_b.sqrt(),
    })
}
