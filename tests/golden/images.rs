//! Golden tests: images and videos.

use safetensors::SafeTensors;
use serde_json::Value;
use tests::golden;
use trainer::data::{
    ImageProcessor, Patches, Processor, VideoProcessor, VideoSampling, load_image, smart_resize,
    smart_resize_video,
};

/// Levels of 255 that an honest decoder or resize may differ by. Ours is exact where the decoder is.
const MAX_LEVELS: f32 = 2.0;
const MEAN_LEVELS: f64 = 0.5;

fn manifest() -> Value {
    let bytes = fs_err::read(golden("data/image_processor_golden.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn tensors() -> Vec<u8> {
    fs_err::read(golden("data/image_processor_golden.safetensors")).unwrap()
}

fn images() -> ImageProcessor {
    ImageProcessor::from_dir(&golden("checkpoints/moe_vl"))
        .unwrap()
        .unwrap()
}

fn videos() -> VideoProcessor {
    VideoProcessor::from_dir(&golden("checkpoints/moe_vl"))
        .unwrap()
        .unwrap()
}

fn number(value: &Value, key: &str) -> usize {
    usize::try_from(value[key].as_u64().unwrap()).unwrap()
}

/// `[channel, time, row, column]` of each patch without the second time.
fn first_time(patches: &Patches) -> Vec<f32> {
    patches
        .pixel_values
        .chunks_exact(512)
        .flat_map(|both| both[..256].to_vec())
        .collect()
}

/// The largest and the mean distance, in levels.
fn distance(pixel_values: &[f32], levels: &[u8]) -> (f32, f64) {
    assert_eq!(pixel_values.len(), levels.len());
    let distances = pixel_values
        .iter()
        .zip(levels)
        .map(|(value, level)| (value * 127.5 + 127.5 - f32::from(*level)).abs());
    let (largest, total) = distances.fold((0f32, 0f64), |(largest, total), d| {
        (largest.max(d), total + f64::from(d))
    });
    (largest, total / levels.len() as f64)
}

#[test]
fn every_picture_becomes_the_grid_and_levels_of_transformers() {
    let (manifest, bytes) = (manifest(), tensors());
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let processor = images();
    let pictures = manifest["images"].as_object().unwrap();
    assert_eq!(pictures.len(), 25);
    for (name, expected) in pictures {
        let image = load_image(&golden(&format!("data/images/{name}"))).unwrap();
        let size = [image.width, image.height].map(Value::from);
        assert_eq!(
            expected["loaded_size"].as_array().unwrap()[..],
            size,
            "{name}"
        );
        let patches = processor.process(&image).unwrap();
        let grid = patches.grid_thw.map(Value::from);
        assert_eq!(expected["grid_thw"].as_array().unwrap()[..], grid, "{name}");
        let levels = tensors.tensor(&format!("{name}/levels")).unwrap();
        let (largest, mean) = distance(&first_time(&patches), levels.data());
        assert!(
            largest <= MAX_LEVELS && mean <= MEAN_LEVELS,
            "{name}: {largest} levels, mean {mean}"
        );
        // Float noise aside, every level is equal: the decoders give the same pixels, the resize the same integers.
        assert!(largest < 1e-3, "{name}: {largest} levels");
    }
}

#[test]
fn decoders_give_the_pixels_of_pillow() {
    let (manifest, bytes) = (manifest(), tensors());
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for name in manifest["images"].as_object().unwrap().keys() {
        let image = load_image(&golden(&format!("data/images/{name}"))).unwrap();
        let rgb = tensors.tensor(&format!("{name}/rgb")).unwrap();
        // Of the large ones the top left corner is kept.
        let (rows, columns) = (rgb.shape()[0], rgb.shape()[1]);
        let found: Vec<u8> = image
            .pixels
            .chunks_exact(image.width * 3)
            .take(rows)
            .flat_map(|row| row[..columns * 3].to_vec())
            .collect();
        assert!(found == rgb.data(), "{name}");
    }
}

#[test]
fn pixel_values_are_normalised_in_patch_order() {
    let bytes = tensors();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for name in ["gray_70x45.png", "rgb_64x64.png", "tiny_7x5.png"] {
        let image = load_image(&golden(&format!("data/images/{name}"))).unwrap();
        let patches = images().process(&image).unwrap();
        let expected = tensors.tensor(&format!("{name}/pixel_values")).unwrap();
        let expected: Vec<f32> = expected
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        assert_eq!(patches.pixel_values.len(), expected.len(), "{name}");
        let worst = patches
            .pixel_values
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0f32, f32::max);
        assert!(worst <= 1e-6, "{name}: {worst}");
    }
}

#[test]
fn sizes_follow_the_table_of_transformers() {
    let manifest = manifest();
    for case in manifest["smart_resize"].as_array().unwrap() {
        let found = smart_resize(
            number(case, "height"),
            number(case, "width"),
            number(case, "factor"),
            number(case, "min_pixels") as u64,
            number(case, "max_pixels") as u64,
        );
        compare_size(case, found.map_err(|error| error.to_string()));
    }
    for case in manifest["video_smart_resize"].as_array().unwrap() {
        let found = smart_resize_video(
            number(case, "frames"),
            number(case, "height"),
            number(case, "width"),
            number(case, "temporal_factor"),
            number(case, "factor"),
            number(case, "min_pixels") as u64,
            number(case, "max_pixels") as u64,
        );
        compare_size(case, found.map_err(|error| error.to_string()));
    }
}

fn compare_size(case: &Value, found: Result<(usize, usize), String>) {
    match (&case["result"], found) {
        (Value::String(expected), Err(found)) => {
            assert!(found.starts_with(expected), "{found}: {case}")
        }
        (expected, Ok((height, width))) => {
            assert_eq!(*expected, serde_json::json!([height, width]), "{case}");
        }
        (_, Err(found)) => panic!("{found}: {case}"),
    }
}

/// transformers #44474 and others: the rate was ignored and the times were wrong.
#[test]
fn video_frames_grids_and_times_equal_transformers() {
    let (manifest, bytes) = (manifest(), tensors());
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let processor = videos();
    let mut compared = 0;
    for case in manifest["videos"].as_array().unwrap() {
        let index = number(case, "case");
        let frames = (0..number(case, "frames"))
            .map(|frame| load_image(&golden(&format!("data/images/video/{frame:04}.png"))).unwrap())
            .collect();
        let options = &case["options"];
        let sampling = VideoSampling {
            do_sample_frames: options["do_sample_frames"].as_bool(),
            fps: options["fps"].as_f64(),
            num_frames: options["num_frames"]
                .as_u64()
                .and_then(|frames| usize::try_from(frames).ok()),
        };
        let found = processor.process(frames, case["fps"].as_f64(), sampling);
        if let Some(expected) = case["error"].as_str() {
            let error = format!("ValueError: {}", found.unwrap_err());
            assert_eq!(error, expected, "case {index}");
            continue;
        }
        let found = found.unwrap();
        let grid = found.patches.grid_thw.map(Value::from);
        assert_eq!(
            case["video_grid_thw"].as_array().unwrap()[..],
            grid,
            "case {index}"
        );
        let levels = tensors.tensor(&format!("video_{index}/levels")).unwrap();
        let (largest, _) = distance(&found.patches.pixel_values, levels.data());
        assert!(largest < 1e-3, "case {index}: {largest} levels");
        let [_, height, width] = found.patches.grid_thw;
        let tokens = usize::try_from(height * width / 4).unwrap();
        let text: String = found
            .timestamps
            .iter()
            .map(|seconds| {
                let pads = "<|video_pad|>".repeat(tokens);
                format!("<{seconds:.1} seconds><|vision_start|>{pads}<|vision_end|>")
            })
            .collect();
        let text = format!("<|vision_start|>{text}<|vision_end|>");
        assert_eq!(text, case["text"].as_str().unwrap(), "case {index}");
        compared += 1;
    }
    assert_eq!(compared, 8);
}

/// Newer checkpoints nest both in one file.
#[test]
fn settings_nested_in_processor_config_are_the_same() {
    let source = golden("checkpoints/moe_vl");
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs_err::read(source.join(name)).unwrap()).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        fs_err::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    let nested = serde_json::json!({
        "image_processor": read("preprocessor_config.json"),
        "video_processor": read("video_preprocessor_config.json"),
    });
    fs_err::write(
        folder.path().join("processor_config.json"),
        nested.to_string(),
    )
    .unwrap();
    let processor = Processor::from_dir(folder.path()).unwrap();
    let image = load_image(&golden("data/images/rgb_50x77.png")).unwrap();
    let nested = processor
        .image_processor()
        .unwrap()
        .process(&image)
        .unwrap();
    assert_eq!(nested, images().process(&image).unwrap());
    assert!(processor.video_processor().is_some());
}

#[test]
fn very_long_and_very_small_pictures_end_with_a_size_or_an_error() {
    use trainer::data::RgbImage;
    let picture = |width: usize, height: usize| RgbImage {
        pixels: vec![9; width * height * 3],
        width,
        height,
    };
    let patches = images().process(&picture(1, 1)).unwrap();
    assert_eq!(patches.grid_thw, [1, 2, 2]);
    let error = images()
        .process(&picture(1, 65_535))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("aspect ratio") && error.contains("65535"),
        "{error}"
    );
}

/// libjpeg fills what is missing with gray and calls it a warning.
#[test]
fn a_picture_cut_short_is_an_error_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut");
    for name in [
        "rgb_120x90.jpg",
        "cmyk_64x56.jpg",
        "rgb_64x64.png",
        "webp_72x54.webp",
        "interlaced_gif_60x44.gif",
    ] {
        let bytes = fs_err::read(golden(&format!("data/images/{name}"))).unwrap();
        for length in [30, bytes.len() / 2, bytes.len() * 9 / 10] {
            fs_err::write(&path, &bytes[..length]).unwrap();
            let error = load_image(&path).unwrap_err().to_string();
            assert!(
                error.contains("cut short") || error.contains("cannot be decoded"),
                "{name}: {error}"
            );
        }
    }
}
