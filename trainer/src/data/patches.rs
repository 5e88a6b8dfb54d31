//! Images as the vision tower wants them: resized, normalised, cut into patches in merge order.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::error::{DataError, ImageError};
use super::image::RgbImage;
use super::resize::resize;
use super::smart_resize::smart_resize;

/// Settings that images and videos share; read from preprocessor files.
#[derive(Debug, Clone)]
pub(crate) struct PatchSettings {
    pub(crate) patch_size: usize,
    pub(crate) temporal_patch_size: usize,
    pub(crate) merge_size: usize,
    pub(crate) min_pixels: u64,
    pub(crate) max_pixels: u64,
    mean: [f32; 3],
    std: [f32; 3],
}

/// Image processing as preprocessor_config.json says.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    pub(crate) settings: PatchSettings,
}

/// A picture or a video, cut up.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// Temporal patches, patch rows, patch columns.
    pub grid_thw: [i64; 3],
    /// `[t * h * w, 3 * temporal_patch_size * patch_size^2]`, row by row.
    pub pixel_values: Vec<f32>,
}

impl ImageProcessor {
    /// Reads `preprocessor_config.json`, or `image_processor` in `processor_config.json`. A directory with neither
    /// (a text-only checkpoint) gives `None`.
    ///
    /// # Errors
    /// A file that is not JSON, or a setting that this processing cannot follow.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>, DataError> {
        let Some((file, settings)) =
            read_settings(dir, "preprocessor_config.json", "image_processor")?
        else {
            return Ok(None);
        };
        // The values of the released checkpoints.
        let settings = PatchSettings::from_json(&file, &settings, (65_536, 16_777_216))?;
        Ok(Some(Self { settings }))
    }

    /// Resizes and cuts up one image.
    ///
    /// # Errors
    /// An aspect ratio above 200.
    pub fn process(&self, image: &RgbImage) -> Result<Patches, ImageError> {
        let settings = &self.settings;
        let (height, width) = smart_resize(
            image.height,
            image.width,
            settings.factor(),
            settings.min_pixels,
            settings.max_pixels,
        )?;
        let resized = resize(image, height, width);
        let frames = vec![&resized; settings.temporal_patch_size];
        Ok(settings.cut(&frames))
    }
}

impl PatchSettings {
    /// Side of the square that one token covers, in pixels.
    pub(crate) fn factor(&self) -> usize {
        self.patch_size * self.merge_size
    }

    /// Patches a token.
    pub(crate) fn patches_per_token(&self) -> usize {
        self.merge_size * self.merge_size
    }

    pub(crate) fn from_json(
        file: &Path,
        json: &Map<String, Json>,
        (min_default, max_default): (u64, u64),
    ) -> Result<Self, DataError> {
        for key in ["do_resize", "do_rescale", "do_normalize"] {
            if json.get(key) == Some(&Json::Bool(false)) {
                return Err(setting(
                    file,
                    key,
                    &json[key],
                    "true (the model is trained on resized, normalised pictures)",
                ));
            }
        }
        let size = json.get("size").unwrap_or(&Json::Null);
        let pixels = |old: &'static str, new: &'static str, default: u64| match json
            .get(old)
            .filter(|value| !value.is_null())
            .or_else(|| size.get(new))
        {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .filter(|&pixels| pixels > 0)
                .ok_or_else(|| setting(file, new, value, "a positive number of pixels")),
        };
        let settings = Self {
            patch_size: positive(file, json, "patch_size", 16)?,
            temporal_patch_size: positive(file, json, "temporal_patch_size", 2)?,
            merge_size: positive(file, json, "merge_size", 2)?,
            min_pixels: pixels("min_pixels", "shortest_edge", min_default)?,
            max_pixels: pixels("max_pixels", "longest_edge", max_default)?,
            mean: three(file, json, "image_mean")?,
            std: three(file, json, "image_std")?,
        };
        let scale = match json.get("rescale_factor") {
            None | Some(Json::Null) => 1.0 / 255.0,
            Some(value) => value
                .as_f64()
                .filter(|&factor| factor > 0.0)
                .ok_or_else(|| setting(file, "rescale_factor", value, "a positive number"))?,
        };
        // Mean and deviation in levels, so that a level is normalised in one step.
        let levels = |value: f32| single(f64::from(value) / scale);
        Ok(Self {
            mean: settings.mean.map(levels),
            std: settings.std.map(levels),
            ..settings
        })
    }

    /// Cuts frames of one size (multiples of the factor; as many as whole temporal patches) into patches.
    ///
    /// Order: temporal patch, block row, block column, the block's patches row by row; inside a patch channel, time,
    /// row, column.
    pub(crate) fn cut(&self, frames: &[&RgbImage]) -> Patches {
        let (height, width) = frames
            .first()
            .map_or((0, 0), |frame| (frame.height, frame.width));
        let (patch, merge, times) = (self.patch_size, self.merge_size, self.temporal_patch_size);
        let (rows, columns) = (height / patch, width / patch);
        let table = self.normalised_levels();
        let mut pixel_values = Vec::with_capacity(frames.len() * height * width * 3);
        for frames in frames.chunks_exact(times) {
            for block_row in 0..rows / merge {
                for block_column in 0..columns / merge {
                    for inside in 0..merge * merge {
                        let top = (block_row * merge + inside / merge) * patch;
                        let left = (block_column * merge + inside % merge) * patch;
                        for (channel, table) in table.iter().enumerate() {
                            for frame in frames {
                                for row in top..top + patch {
                                    let start = (row * width + left) * 3;
                                    let line = &frame.pixels[start..start + patch * 3];
                                    pixel_values.extend(
                                        line.iter()
                                            .skip(channel)
                                            .step_by(3)
                                            .map(|&level| table[usize::from(level)]),
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
        let grid_thw = [frames.len() / times, rows, columns];
        Patches {
            grid_thw: grid_thw.map(|size| i64::try_from(size).unwrap_or(i64::MAX)),
            pixel_values,
        }
    }

    /// (level - mean) / std of every level and channel, in float32.
    fn normalised_levels(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|channel| {
            std::array::from_fn(|level| {
                let level = u16::try_from(level).map_or(0.0, f32::from);
                (level - self.mean[channel]) / self.std[channel]
            })
        })
    }
}

/// Settings, and the file that holds them.
type SettingsFile = (std::path::PathBuf, Map<String, Json>);

/// The settings in `dir/name`, or under `key` in `dir/processor_config.json`, where newer checkpoints nest them.
pub(crate) fn read_settings(
    dir: &Path,
    name: &str,
    key: &'static str,
) -> Result<Option<SettingsFile>, DataError> {
    let own = dir.join(name);
    if let Some(settings) = read_object(&own)? {
        return Ok(Some((own, settings)));
    }
    let nested = dir.join("processor_config.json");
    match read_object(&nested)?.and_then(|mut object| object.remove(key)) {
        None => Ok(None),
        Some(Json::Object(settings)) => Ok(Some((nested, settings))),
        Some(other) => Err(setting(&nested, key, &other, "an object")),
    }
}

fn read_object(file: &Path) -> Result<Option<Map<String, Json>>, DataError> {
    match fs_err::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| DataError::Json {
                file: file.to_owned(),
                source,
            }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DataError::Read {
            file: file.to_owned(),
            source,
        }),
    }
}

pub(crate) fn setting(
    file: &Path,
    key: &'static str,
    found: &Json,
    expected: &'static str,
) -> DataError {
    DataError::Setting {
        file: file.to_owned(),
        key,
        found: found.to_string(),
        expected,
    }
}

fn positive(
    file: &Path,
    json: &Map<String, Json>,
    key: &'static str,
    default: usize,
) -> Result<usize, DataError> {
    match json.get(key) {
        None | Some(Json::Null) => Ok(default),
        // The largest sizes in use are two digits; the cap keeps products far from overflow.
        Some(value) => value
            .as_u64()
            .filter(|size| (1..=1024).contains(size))
            .and_then(|size| usize::try_from(size).ok())
            .ok_or_else(|| setting(file, key, value, "a whole number from 1 to 1024")),
    }
}

fn three(file: &Path, json: &Map<String, Json>, key: &'static str) -> Result<[f32; 3], DataError> {
    match json.get(key) {
        None | Some(Json::Null) => Ok([0.5; 3]),
        Some(value) => value
            .as_array()
            .filter(|values| values.len() == 3)
            .and_then(|values| {
                let numbers: Option<Vec<f64>> = values.iter().map(Json::as_f64).collect();
                let numbers: [f64; 3] = numbers?.try_into().ok()?;
                Some(numbers.map(single))
            })
            .ok_or_else(|| setting(file, key, value, "three numbers")),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to float32 is wanted"
)]
fn single(value: f64) -> f32 {
    value as f32
}
