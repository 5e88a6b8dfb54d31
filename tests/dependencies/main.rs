//! The crates that we are built from: their licences are those of deny.toml, and their sources cannot change under us.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use spdx::{Expression, LicenseItem, ParseMode};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Every crate that Cargo.lock has for this platform, but for those of the workspace.
fn crates() -> Vec<Value> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    // --locked: Cargo.lock is whole and was not changed for this.
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{stderr}");
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    let ours = metadata["workspace_members"].as_array().unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .filter(|package| !ours.contains(&package["id"]))
        .cloned()
        .collect()
}

fn allowed() -> Vec<String> {
    let text = fs_err::read_to_string(root().join("deny.toml")).unwrap();
    let deny: toml::Table = text.parse().unwrap();
    deny["licenses"]["allow"].clone().try_into().unwrap()
}

/// Whether one of the licences that `expression` offers is among `allowed`.
fn fits(expression: &str, allowed: &[String]) -> bool {
    // Old crates write `MIT/Apache-2.0`.
    let expression = Expression::parse_mode(expression, ParseMode::LAX).unwrap();
    expression.evaluate(|needed| match &needed.license {
        LicenseItem::Spdx { id, .. } => {
            needed.addition.is_none() && allowed.iter().any(|name| name == id.name)
        }
        LicenseItem::Other { .. } => false,
    })
}

#[test]
fn every_crate_offers_a_licence_that_we_take() {
    let allowed = allowed();
    let crates = crates();
    assert!(crates.len() > 200, "{} crates", crates.len());
    let wrong: Vec<String> = crates
        .iter()
        .filter(|one| {
            !fits(
                one["license"].as_str().unwrap_or("LicenseRef-none"),
                &allowed,
            )
        })
        .map(|one| format!("{} {}: {}", one["name"], one["version"], one["license"]))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn licences_that_restrict_are_refused() {
    let allowed = allowed();
    for refused in [
        "GPL-3.0-or-later",
        "AGPL-3.0",
        "MIT AND GPL-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "LicenseRef-none",
    ] {
        assert!(!fits(refused, &allowed), "{refused}");
    }
    for taken in [
        "MIT/Apache-2.0",
        "GPL-2.0 OR MIT",
        "(MIT OR GPL-2.0) AND Unicode-3.0",
    ] {
        assert!(fits(taken, &allowed), "{taken}");
    }
}

/// A git revision can vanish, and a path is somebody's disk; of a registry's crates Cargo.lock holds the SHA-256.
#[test]
fn every_crate_comes_from_the_registry_with_its_checksum() {
    let lock = fs_err::read_to_string(root().join("Cargo.lock")).unwrap();
    let lock: toml::Table = lock.parse().unwrap();
    let locked = lock["package"].as_array().unwrap();
    for one in crates() {
        let (name, version) = (&one["name"], &one["version"]);
        let source = one["source"].as_str().unwrap_or_default();
        assert!(
            source.starts_with("registry+") && source.ends_with("/crates.io-index"),
            "{name} {version} comes from {source:?}"
        );
        let entry = locked.iter().find(|entry| {
            entry["name"].as_str() == name.as_str() && entry["version"].as_str() == version.as_str()
        });
        let checksum = entry.and_then(|entry| entry.get("checksum")?.as_str());
        assert_eq!(checksum.map(str::len), Some(64), "{name} {version}");
    }
}
