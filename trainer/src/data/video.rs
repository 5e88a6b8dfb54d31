//! Videos: which frames are kept, what size they get, how they are cut up, and the time that each patch shows.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::error::{DataError, ImageError, VideoError};
use super::ffmpeg;
use super::image::{RgbImage, load_image};
use super::patches::{PatchSettings, Patches, read_settings, setting};
use super::resize::resize;
use super::smart_resize::smart_resize_video;

/// The rate that the reference assumes when a video's own is unknown.
const UNKNOWN_FPS: f64 = 24.0;
/// Frames of a list that are used without sampling; released checkpoints sample at most 768.
const MAX_LISTED_FRAMES: usize = 4096;
/// Extensions that count as frames of a folder.
const FRAME_EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "webp", "bmp", "gif"];

/// Video processing as video_preprocessor_config.json says.
#[derive(Debug, Clone)]
pub struct VideoProcessor {
    pub(crate) settings: PatchSettings,
    fps: Option<f64>,
    num_frames: Option<usize>,
    min_frames: usize,
    max_frames: usize,
    do_sample_frames: bool,
    cap_pixels_per_frame: bool,
}

/// A video, cut up, with the time of each temporal patch.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoPatches {
    /// Grid and pixels.
    pub patches: Patches,
    /// Seconds from the start, one a temporal patch.
    pub timestamps: Vec<f64>,
}

/// How frames are chosen, where a row asks for something else than the checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct VideoSampling {
    /// Whether frames are sampled at all; by default listed frames are all used, folders and files are sampled.
    pub do_sample_frames: Option<bool>,
    /// Frames a second to keep.
    pub fps: Option<f64>,
    /// Frames to keep, instead of a rate.
    pub num_frames: Option<usize>,
}

/// Where the frames of a video come from.
#[derive(Debug, Clone)]
pub(crate) enum FrameSource {
    /// One file a frame, in order.
    Files(Vec<PathBuf>),
    /// Pictures already in memory.
    Pictures(Vec<RgbImage>),
    /// A video file that ffmpeg decodes.
    Video(PathBuf),
}

impl VideoProcessor {
    /// Reads `video_preprocessor_config.json`, or `video_processor` in `processor_config.json`. A directory with
    /// neither gives `None`.
    ///
    /// # Errors
    /// A file that is not JSON, or a setting that this processing cannot follow.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>, DataError> {
        let Some((file, json)) =
            read_settings(dir, "video_preprocessor_config.json", "video_processor")?
        else {
            return Ok(None);
        };
        // The values of the released checkpoints.
        let settings = PatchSettings::from_json(&file, &json, (4096, 25_165_824))?;
        let count = |key: &'static str| match json.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(value) => value
                .as_u64()
                .filter(|&count| count > 0)
                .and_then(|count| usize::try_from(count).ok())
                .map(Some)
                .ok_or_else(|| setting(&file, key, value, "a positive number of frames")),
        };
        let fps = match json.get("fps") {
            None => Some(2.0),
            Some(Json::Null) => None,
            Some(value) => Some(
                value
                    .as_f64()
                    .filter(|&fps| fps > 0.0)
                    .ok_or_else(|| setting(&file, "fps", value, "a positive number or null"))?,
            ),
        };
        let flag =
            |key: &str, default: bool| json.get(key).and_then(Json::as_bool).unwrap_or(default);
        Ok(Some(Self {
            fps,
            num_frames: count("num_frames")?,
            min_frames: count("min_frames")?.unwrap_or(4),
            max_frames: count("max_frames")?.unwrap_or(768),
            do_sample_frames: flag("do_sample_frames", true),
            cap_pixels_per_frame: flag("cap_pixels_per_frame", false),
            settings,
        }))
    }

    /// Processes frames in memory, taken at `source_fps` (24 when unknown); all are used unless `sampling` asks for
    /// fewer.
    ///
    /// # Errors
    /// Fewer than two frames, frames of different sizes, an aspect ratio above 200, contradicting options.
    pub fn process(
        &self,
        frames: Vec<RgbImage>,
        source_fps: Option<f64>,
        sampling: VideoSampling,
    ) -> Result<VideoPatches, VideoError> {
        self.process_source(&FrameSource::Pictures(frames), source_fps, sampling)
    }

    pub(crate) fn process_source(
        &self,
        source: &FrameSource,
        source_fps: Option<f64>,
        sampling: VideoSampling,
    ) -> Result<VideoPatches, VideoError> {
        match source {
            FrameSource::Files(files) => {
                let (indices, fps) = self.choose(files.len(), source_fps, sampling, false)?;
                let frames = indices.iter().map(|&index| {
                    load_image(&files[index]).map_err(|source| VideoError::Frame {
                        frame: index,
                        name: files[index].display().to_string(),
                        source,
                    })
                });
                self.process_frames(&indices, fps, frames)
            }
            FrameSource::Pictures(pictures) => {
                let (indices, fps) = self.choose(pictures.len(), source_fps, sampling, false)?;
                let frames = indices.iter().map(|&index| Ok(pictures[index].clone()));
                self.process_frames(&indices, fps, frames)
            }
            FrameSource::Video(file) => {
                let probe = ffmpeg::probe(file)?;
                let (indices, fps) = self.choose(
                    probe.frames,
                    source_fps.or(probe.fps),
                    sampling,
                    self.do_sample_frames,
                )?;
                self.process_frames(&indices, fps, ffmpeg::frames(file, &indices)?)
            }
        }
    }

    /// The frames to keep of `total`, and the source's rate.
    fn choose(
        &self,
        total: usize,
        source_fps: Option<f64>,
        sampling: VideoSampling,
        by_default: bool,
    ) -> Result<(Vec<usize>, f64), VideoError> {
        let fps = source_fps.unwrap_or(UNKNOWN_FPS);
        if !(fps > 0.0 && fps.is_finite()) {
            return Err(VideoError::Fps { fps });
        }
        if total == 0 {
            return Err(self.too_few(0));
        }
        if !sampling.do_sample_frames.unwrap_or(by_default) {
            if total > MAX_LISTED_FRAMES {
                return Err(VideoError::TooManyFrames {
                    frames: total,
                    limit: MAX_LISTED_FRAMES,
                });
            }
            return Ok(((0..total).collect(), fps));
        }
        let target_fps = sampling.fps.or(self.fps);
        let kept = match (sampling.num_frames.or(self.num_frames), target_fps) {
            (Some(_), Some(_)) => return Err(VideoError::NumFramesAndFps),
            (Some(frames), None) => frames.min(total),
            (None, target) => {
                let target = target.unwrap_or(2.0);
                if !(target > 0.0 && target.is_finite()) {
                    return Err(VideoError::Fps { fps: target });
                }
                let wanted = whole(total as f64 / fps * target);
                wanted.max(self.min_frames).min(self.max_frames).min(total)
            }
        };
        if kept > MAX_LISTED_FRAMES {
            return Err(VideoError::TooManyFrames {
                frames: kept,
                limit: MAX_LISTED_FRAMES,
            });
        }
        Ok((evenly_spaced(total, kept), fps))
    }

    fn process_frames(
        &self,
        indices: &[usize],
        fps: f64,
        frames: impl Iterator<Item = Result<RgbImage, VideoError>>,
    ) -> Result<VideoPatches, VideoError> {
        let settings = &self.settings;
        if indices.len() < settings.temporal_patch_size {
            return Err(self.too_few(indices.len()));
        }
        let mut first_size = None;
        let mut resized: Vec<RgbImage> = Vec::with_capacity(indices.len());
        for (frame, &index) in frames.zip(indices) {
            let frame = frame?;
            let (first_height, first_width, height, width) = match first_size {
                Some(size) => size,
                None => {
                    let target = self.target_size(indices.len(), frame.height, frame.width)?;
                    *first_size.insert((frame.height, frame.width, target.0, target.1))
                }
            };
            if (frame.height, frame.width) != (first_height, first_width) {
                return Err(VideoError::FrameSize {
                    frame: index,
                    width: frame.width,
                    height: frame.height,
                    first_width,
                    first_height,
                });
            }
            resized.push(resize(&frame, height, width));
        }
        if resized.len() < indices.len() {
            return Err(VideoError::Ffmpeg {
                detail: format!("it gave {} of {} frames", resized.len(), indices.len()),
            });
        }
        // The last frame fills the last patch.
        let times = settings.temporal_patch_size;
        let padded = resized.len().next_multiple_of(times);
        let last = resized.len() - 1;
        let frames: Vec<&RgbImage> = (0..padded).map(|index| &resized[index.min(last)]).collect();
        let seconds: Vec<f64> = (0..padded)
            .map(|index| indices[index.min(last)] as f64 / fps)
            .collect();
        let timestamps = seconds
            .chunks_exact(times)
            .map(|pair| (pair[0] + pair[times - 1]) / 2.0)
            .collect();
        Ok(VideoPatches {
            patches: settings.cut(&frames),
            timestamps,
        })
    }

    fn target_size(
        &self,
        frames: usize,
        height: usize,
        width: usize,
    ) -> Result<(usize, usize), VideoError> {
        let settings = &self.settings;
        let max_pixels = if self.cap_pixels_per_frame {
            // The reference's bounds on one frame: 768 tokens, and a little more than the smallest area.
            let frames = frames as u64;
            let floor = settings.min_pixels + settings.min_pixels / 20;
            frames * (settings.max_pixels / frames).min(768 * 32 * 32).max(floor)
        } else {
            settings.max_pixels
        };
        smart_resize_video(
            frames,
            height,
            width,
            settings.temporal_patch_size,
            settings.factor(),
            settings.min_pixels,
            max_pixels,
        )
    }

    fn too_few(&self, frames: usize) -> VideoError {
        VideoError::TooFewFrames {
            frames,
            temporal_factor: self.settings.temporal_patch_size,
        }
    }

    /// What stands at `path`: a folder of frames (sampled like a video), or a video file.
    pub(crate) fn open(
        &self,
        path: &Path,
        sampling: VideoSampling,
    ) -> Result<(FrameSource, VideoSampling), VideoError> {
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(VideoError::Missing);
            }
            Err(error) => return Err(VideoError::Read(error)),
        };
        if metadata.is_dir() {
            let sampling = VideoSampling {
                do_sample_frames: sampling.do_sample_frames.or(Some(self.do_sample_frames)),
                ..sampling
            };
            return Ok((FrameSource::Files(frames_of_folder(path)?), sampling));
        }
        if !metadata.is_file() {
            return Err(VideoError::Size(ImageError::NotAFile));
        }
        Ok((FrameSource::Video(path.to_owned()), sampling))
    }
}

/// The pictures of a folder in the order of the numbers in their names (`2.png` before `10.png`).
fn frames_of_folder(folder: &Path) -> Result<Vec<PathBuf>, VideoError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(VideoError::Read)? {
        let path = entry.map_err(VideoError::Read)?.path();
        let extension = path
            .extension()
            .and_then(|extension| extension.to_str())
            .unwrap_or_default();
        if FRAME_EXTENSIONS
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
        {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(VideoError::NoFrames);
    }
    files.sort_by_cached_key(|path| {
        natural_key(&path.file_name().unwrap_or_default().to_string_lossy())
    });
    Ok(files)
}

/// Text and numbers of a name in turn; numbers compare by length without leading zeros, then by digits.
fn natural_key(name: &str) -> Vec<(String, usize, String)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text_end = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (text, tail) = rest.split_at(text_end);
        let number_end = tail
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (digits, tail) = tail.split_at(number_end);
        let digits = digits.trim_start_matches('0');
        key.push((text.to_owned(), digits.len(), digits.to_owned()));
        rest = tail;
    }
    key
}

/// `linspace(0, total - 1, kept)`, rounded half to even.
fn evenly_spaced(total: usize, kept: usize) -> Vec<usize> {
    let last = (total - 1) as f64;
    let step = if kept > 1 {
        last / (kept - 1) as f64
    } else {
        0.0
    };
    (0..kept)
        .map(|index| {
            let position = if index > 0 && index + 1 == kept {
                last
            } else {
                index as f64 * step
            };
            whole(position.round_ties_even())
        })
        .collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "truncation is the definition; counts are positive and below 2^53"
)]
fn whole(value: f64) -> usize {
    value as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor() -> VideoProcessor {
        let file = Path::new("video_preprocessor_config.json");
        VideoProcessor {
            settings: PatchSettings::from_json(file, &serde_json::Map::new(), (4096, 131_072))
                .unwrap(),
            fps: Some(2.0),
            num_frames: None,
            min_frames: 4,
            max_frames: 16,
            do_sample_frames: true,
            cap_pixels_per_frame: false,
        }
    }

    fn frames(count: usize) -> Vec<RgbImage> {
        vec![
            RgbImage {
                pixels: vec![7; 64 * 64 * 3],
                width: 64,
                height: 64
            };
            count
        ]
    }

    #[test]
    fn zero_frames_and_one_frame_are_refused() {
        for count in 0..2 {
            let error = processor()
                .process(frames(count), Some(1.0), VideoSampling::default())
                .unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("t:{count} must be larger than temporal_factor:2")
            );
        }
    }

    #[test]
    fn a_hundred_thousand_listed_frames_are_refused_and_sampled_ones_are_bounded() {
        let files = FrameSource::Files(vec![PathBuf::from("absent.png"); 100_000]);
        let error = processor()
            .process_source(&files, Some(30.0), VideoSampling::default())
            .unwrap_err();
        assert!(
            matches!(
                error,
                VideoError::TooManyFrames {
                    frames: 100_000,
                    ..
                }
            ),
            "{error:?}"
        );
        let sampling = VideoSampling {
            do_sample_frames: Some(true),
            ..VideoSampling::default()
        };
        let (indices, _) = processor()
            .choose(100_000, Some(30.0), sampling, false)
            .unwrap();
        assert_eq!((indices.len(), indices[0], indices[15]), (16, 0, 99_999));
    }

    #[test]
    fn rates_that_are_no_rates_are_refused() {
        for fps in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = processor()
                .process(frames(4), Some(fps), VideoSampling::default())
                .unwrap_err();
            assert!(matches!(error, VideoError::Fps { .. }), "{error:?}");
        }
    }

    #[test]
    fn frames_of_another_size_are_named() {
        let mut frames = frames(3);
        frames[2].width = 32;
        let error = processor()
            .process(frames, None, VideoSampling::default())
            .unwrap_err();
        assert!(
            matches!(
                error,
                VideoError::FrameSize {
                    frame: 2,
                    width: 32,
                    ..
                }
            ),
            "{error:?}"
        );
    }

    #[test]
    fn frame_names_sort_by_their_numbers() {
        let mut names = ["f10.png", "f9.png", "f009b.png", "a.png", "f1.png"];
        names.sort_by_cached_key(|name| natural_key(name));
        assert_eq!(names, ["a.png", "f1.png", "f9.png", "f009b.png", "f10.png"]);
    }
}
