//! The command line: data.

use std::ffi::OsStr;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tests::golden;

use crate::program::trainer;

/// Exit code, stdout, stderr.
fn data(file: &Path, args: &[&str]) -> (i32, String, String) {
    let model = golden("checkpoints/moe_vl");
    let words = ["data", "--model"].map(OsStr::new);
    let data = [model.as_os_str(), OsStr::new("--data"), file.as_os_str()];
    let args = args.iter().map(OsStr::new);
    trainer(words.into_iter().chain(data).chain(args))
}

fn lines(stdout: &str) -> Vec<Value> {
    stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn json_is_one_object_a_row_and_nothing_else() {
    let (code, stdout, stderr) = data(&golden("data/shapes/train.jsonl"), &["--json"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let rows = lines(&stdout);
    assert_eq!(rows.len(), 64);
    for (index, row) in rows.iter().enumerate() {
        let keys: Vec<&str> = row
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let expected = [
            "row",
            "text",
            "input_ids",
            "labels",
            "mm_token_type_ids",
            "image_grid_thw",
            "video_grid_thw",
        ];
        assert_eq!(keys, expected);
        assert_eq!(row["row"], index);
        assert_eq!(row["image_grid_thw"], json!([[1, 4, 4]]));
        assert_eq!(row["video_grid_thw"], json!([]));
        // The template's output, before the placeholder becomes four.
        assert_eq!(
            row["text"]
                .as_str()
                .unwrap()
                .matches("<|image_pad|>")
                .count(),
            1
        );
        let pads = row["input_ids"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|id| **id == 972)
            .count();
        assert_eq!(pads, 4);
    }
}

#[test]
fn a_bad_row_is_an_object_with_an_error_and_the_exit_code_stays() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.jsonl");
    let good = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let typo = json!({"mesages": []});
    let missing = json!({"messages": [
        {"role": "user", "content": [{"type": "image", "image": "absent.png"}]},
        {"role": "assistant", "content": "b"}]});
    fs_err::write(&file, format!("{good}\n{{\n{typo}\n{missing}\n{good}\n")).unwrap();
    let (code, stdout, stderr) = data(&file, &["--json"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let rows = lines(&stdout);
    assert_eq!(rows.len(), 5);
    for (row, words) in [
        (1, "not valid JSON"),
        (2, "did you mean `messages`?"),
        (3, "`absent.png`: no such file"),
    ] {
        let error = rows[row]["error"].as_str().unwrap();
        assert!(
            error.contains(words) && error.contains(&format!("rows.jsonl, row {row}")),
            "{error}"
        );
        assert_eq!(rows[row].as_object().unwrap().len(), 2);
    }
    assert_eq!(rows[0]["input_ids"], rows[4]["input_ids"]);
    let (code, stdout, _) = data(&file, &[]);
    assert_eq!(code, 0);
    assert!(stdout.contains("5 rows, 3 with errors"), "{stdout}");
}

#[test]
fn tensors_hold_the_pixels_of_each_row() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("pixels.safetensors");
    let args = ["--json", "--limit", "3", "--tensors", out.to_str().unwrap()];
    let (code, stdout, stderr) = data(&golden("data/shapes/train_llava.json"), &args);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(lines(&stdout).len(), 3);
    let bytes = fs_err::read(&out).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "row.0.pixel_values",
            "row.1.pixel_values",
            "row.2.pixel_values"
        ]
    );
    assert_eq!(
        tensors.tensor("row.0.pixel_values").unwrap().shape(),
        [16, 1536]
    );
    // Once more: nothing is written over unasked.
    let (code, stdout, _) = data(&golden("data/shapes/train_llava.json"), &args);
    assert_eq!(code, 1);
    assert!(stdout.contains("--overwrite"), "{stdout}");
}

/// trl #5213 and others: nobody saw which tokens were trained on.
#[test]
fn the_supervised_part_is_marked_with_and_without_colour() {
    let file = golden("data/shapes/train.jsonl");
    let (_, plain, _) = data(&file, &["--limit", "1"]);
    assert!(plain.contains("{+four<|im_end|>+}"), "{plain}");
    assert!(!plain.contains('\u{1b}'), "{plain}");
    assert!(
        plain.contains("972 x4") && plain.contains("image_grid_thw 1x4x4"),
        "{plain}"
    );
    let (_, coloured, _) = data(&file, &["--limit", "1", "--color", "always"]);
    assert!(
        coloured.contains("\u{1b}[32m{+four<|im_end|>+}"),
        "{coloured}"
    );
}

#[test]
fn a_missing_file_or_model_is_an_error_of_the_job() {
    let (code, stdout, stderr) = data(Path::new("absent.jsonl"), &[]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.contains("absent.jsonl"), "{stderr}");
    let (code, stdout, _) = data(Path::new("absent.jsonl"), &["--json"]);
    assert_eq!(code, 1);
    assert!(
        lines(&stdout)[0]["error"]
            .as_str()
            .unwrap()
            .contains("absent.jsonl")
    );
}

#[test]
fn long_rows_are_refused_or_cut() {
    let file = golden("data/shapes/train.jsonl");
    let (_, stdout, _) = data(&file, &["--json", "--limit", "1", "--max-length", "10"]);
    assert!(
        lines(&stdout)[0]["error"]
            .as_str()
            .unwrap()
            .contains("more than the 10 allowed"),
        "{stdout}"
    );
    let (_, stdout, _) = data(
        &file,
        &["--json", "--limit", "1", "--max-length", "10", "--truncate"],
    );
    assert!(
        lines(&stdout)[0]["error"]
            .as_str()
            .unwrap()
            .contains("behind the cut"),
        "{stdout}"
    );
}
