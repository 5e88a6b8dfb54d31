//! The public headers by themselves.

use std::collections::BTreeMap;
use std::process::Command;

use bridge_core::AutoBridge;
use serde_json::Value;
use tests::golden;

use crate::cases::model;

const INCLUDE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bridge-ffi/include");

#[test]
fn headers_alone_compile_without_a_warning() {
    let scratch = tempfile::tempdir().unwrap();
    for (compiler, language, std, header) in [
        ("gcc", "c", "c11", "megatron_bridge.h"),
        ("g++", "c++", "c++17", "megatron_bridge.h"),
        ("g++", "c++", "c++17", "megatron_bridge.hpp"),
        ("g++", "c++", "c++20", "megatron_bridge.hpp"),
        ("g++", "c++", "c++17", "provider.hpp"),
    ] {
        let file = scratch.path().join("alone");
        fs_err::write(&file, format!("#include <megatron_bridge/{header}>\n")).unwrap();
        let output = Command::new(compiler)
            .args([
                "-fsyntax-only",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-pedantic",
                "-x",
                language,
            ])
            .args([&format!("-std={std}"), "-I", INCLUDE])
            .arg(&file)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{header} as {std}: {text}");
    }
}

/// `return KIND("FIELD")` of every function of `provider.hpp`.
fn getters() -> BTreeMap<String, String> {
    let text = fs_err::read_to_string(format!("{INCLUDE}/megatron_bridge/provider.hpp")).unwrap();
    text.split("return ")
        .skip(1)
        .map(|rest| {
            let (kind, rest) = rest.split_once("(\"").unwrap();
            let (field, _) = rest.split_once('"').unwrap();
            (field.to_owned(), kind.to_owned())
        })
        .collect()
}

fn fits(kind: &str, value: &Value) -> bool {
    let bare = kind.strip_prefix("optional_");
    match (bare.unwrap_or(kind), value) {
        (_, Value::Null) => bare.is_some(),
        ("integer", value) => value.is_i64(),
        ("number", value) => value.is_number(),
        ("boolean", value) => value.is_boolean(),
        ("text", value) => value.is_string(),
        ("integers", Value::Array(list)) => list.iter().all(Value::is_i64),
        _ => false,
    }
}

#[test]
fn every_field_of_every_provider_has_a_function_of_its_type() {
    let getters = getters();
    let mut seen: BTreeMap<&str, usize> = getters.keys().map(|one| (one.as_str(), 0)).collect();
    let mut models = 0;
    for name in ["dense_vl", "moe_vl"] {
        models += 1;
        count(
            &AutoBridge::from_hf_pretrained(&model(name)).unwrap(),
            &getters,
            &mut seen,
        );
    }
    for name in ["dense_text", "moe_text", "dense_token_classification"] {
        models += 1;
        let dir = golden(&format!("megatron/checkpoints/{name}"));
        let config = bridge_core::config::HfConfig::from_dir(&dir).unwrap();
        count(&AutoBridge::from_hf_config(config), &getters, &mut seen);
    }
    for (field, count) in seen {
        assert!(count > 0, "no provider has `{field}`");
        let optional = getters[field].starts_with("optional_");
        assert!(
            optional || count == models,
            "`{field}` is missing in some models"
        );
    }
}

fn count<'a>(
    bridge: &AutoBridge,
    getters: &'a BTreeMap<String, String>,
    seen: &mut BTreeMap<&'a str, usize>,
) {
    let fields = serde_json::to_value(bridge.to_megatron_provider()).unwrap();
    for (field, value) in fields.as_object().unwrap() {
        let (field, kind) = getters
            .get_key_value(field)
            .unwrap_or_else(|| panic!("provider.hpp lacks `{field}`"));
        assert!(
            fits(kind, value),
            "`{field}` is {value}, provider.hpp says {kind}"
        );
        *seen.get_mut(field.as_str()).unwrap() += 1;
    }
}
