//! From a row to a sample: template, tokenizer, media and labels of one checkpoint, put together.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::conversation::{Conversation, ImageSource, VideoInput, VideoSource};
use super::dataset::Row;
use super::error::{DataError, ImageError, RowError, TemplateError, VideoError};
use super::image::{RgbImage, load_base64, load_image};
use super::labels::supervised_ranges;
use super::patches::{ImageProcessor, Patches};
use super::placeholders::{Tokens, VideoMarkers, VideoTokens, tokenize};
use super::template::{ChatTemplate, RenderInput};
use super::tokenizer::{ChatTokenizer, read_config};
use super::video::{FrameSource, VideoPatches, VideoProcessor};

/// The label of a token that is no target.
const IGNORED: i64 = -100;

/// Everything of a checkpoint that turns chat rows into samples. Shared between threads.
#[derive(Debug)]
pub struct Processor {
    tokenizer: ChatTokenizer,
    template: Option<ChatTemplate>,
    images: Option<ImageProcessor>,
    videos: Option<VideoProcessor>,
}

/// A row as the model sees it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// The row, counted from 0.
    pub row: usize,
    /// What the template wrote, before placeholders are expanded.
    pub text: String,
    /// Byte ranges of `text` that are supervised.
    pub supervised: Vec<std::ops::Range<usize>>,
    /// Token ids.
    pub input_ids: Vec<i64>,
    /// The token id where the token is a target, else -100; not shifted.
    pub labels: Vec<i64>,
    /// 1 for image tokens, 2 for video tokens, else 0.
    pub mm_token_type_ids: Vec<i64>,
    /// Temporal patches, patch rows, patch columns of each image.
    pub image_grid_thw: Vec<[i64; 3]>,
    /// `[patches of all images, 1536]`.
    pub pixel_values: Vec<f32>,
    /// Temporal patches, patch rows, patch columns of each video.
    pub video_grid_thw: Vec<[i64; 3]>,
    /// `[patches of all videos, 1536]`.
    pub pixel_values_videos: Vec<f32>,
}

/// What is done with a row of more tokens than allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TooLong {
    /// The row is an error.
    #[default]
    Refuse,
    /// The end is cut off, never through an image or a video.
    Truncate,
}

/// How rows become samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Tokens a sample may have.
    pub max_length: Option<usize>,
    /// What happens to longer rows.
    pub too_long: TooLong,
    /// Whether a row without any target is an error.
    pub require_supervised: bool,
    /// Whether the opening of an assistant turn is added at the end.
    pub add_generation_prompt: bool,
    /// What surrounds the patches of a video.
    pub video_markers: VideoMarkers,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            max_length: None,
            too_long: TooLong::Refuse,
            require_supervised: true,
            add_generation_prompt: false,
            video_markers: VideoMarkers::Nested,
        }
    }
}

impl Sample {
    /// Tokens that are targets.
    pub fn supervised_tokens(&self) -> usize {
        self.labels
            .iter()
            .filter(|&&label| label != IGNORED)
            .count()
    }
}

impl Processor {
    /// Reads tokenizer, chat template, image and video settings of a checkpoint directory.
    ///
    /// # Errors
    /// When tokenizer.json is missing, or any of the files is broken. A missing template or processor is an error of
    /// the rows that need it.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self, DataError> {
        let dir = dir.as_ref();
        let config = read_config(dir)?;
        Ok(Self {
            tokenizer: ChatTokenizer::new(dir, &config)?,
            template: ChatTemplate::from_dir(dir, &config)?,
            images: ImageProcessor::from_dir(dir)?,
            videos: VideoProcessor::from_dir(dir)?,
        })
    }

    /// The checkpoint's tokenizer.
    pub fn tokenizer(&self) -> &ChatTokenizer {
        &self.tokenizer
    }

    /// The checkpoint's chat template, if it has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The checkpoint's image processing, if it takes images.
    pub fn image_processor(&self) -> Option<&ImageProcessor> {
        self.images.as_ref()
    }

    /// The checkpoint's video processing, if it takes videos.
    pub fn video_processor(&self) -> Option<&VideoProcessor> {
        self.videos.as_ref()
    }

    /// The text of `ids`.
    pub fn decode(&self, ids: &[i64], skip_special_tokens: bool) -> String {
        self.tokenizer.decode(ids, skip_special_tokens)
    }

    /// Makes a sample of a row; relative media paths start from `base_dir`.
    ///
    /// # Errors
    /// [`DataError::Row`], which names the file and the row.
    pub fn encode(
        &self,
        row: &Row,
        base_dir: &Path,
        options: &EncodeOptions,
    ) -> Result<Sample, DataError> {
        match self.encode_value(&row.value, base_dir, options) {
            Ok(sample) => Ok(Sample {
                row: row.index,
                ..sample
            }),
            Err(cause) => Err(DataError::Row {
                file: row.file.to_path_buf(),
                row: row.index,
                cause: Box::new(cause),
            }),
        }
    }

    /// The prompt that `messages` (a JSON list) make: rendered with the opening of the answer, nothing supervised.
    ///
    /// # Errors
    /// What is wrong with the messages or their media.
    pub fn prompt(
        &self,
        messages: &Json,
        base_dir: &Path,
        enable_thinking: Option<bool>,
    ) -> Result<Sample, RowError> {
        let mut row = Map::new();
        row.insert("messages".into(), messages.clone());
        if let Some(enable_thinking) = enable_thinking {
            row.insert(
                "chat_template_kwargs".into(),
                serde_json::json!({"enable_thinking": enable_thinking}),
            );
        }
        let options = EncodeOptions {
            require_supervised: false,
            add_generation_prompt: true,
            ..EncodeOptions::default()
        };
        let mut sample = self.encode_value(&Json::Object(row), base_dir, &options)?;
        sample.labels.fill(IGNORED);
        sample.supervised.clear();
        Ok(sample)
    }

    /// Makes a sample of a row's JSON, with row number 0.
    ///
    /// # Errors
    /// What is wrong with the row.
    pub fn encode_value(
        &self,
        row: &Json,
        base_dir: &Path,
        options: &EncodeOptions,
    ) -> Result<Sample, RowError> {
        let conversation = Conversation::from_row(row)?;
        conversation.refuse_control_tokens(&self.tokenizer)?;
        let template = self
            .template
            .as_ref()
            .ok_or(RowError::Template(TemplateError::Absent))?;
        let text = template
            .render_input(RenderInput {
                messages: &conversation.messages,
                tools: conversation.tools.as_ref(),
                documents: conversation.documents.as_ref(),
                kwargs: Some(&conversation.template_kwargs),
                add_generation_prompt: options.add_generation_prompt
                    || conversation.add_generation_prompt,
            })
            .map_err(RowError::Template)?;
        let supervised = supervised_ranges(&text, &conversation.assistant_loss)?;
        if supervised.is_empty() && options.require_supervised {
            let reason = if conversation.assistant_loss.is_empty() {
                "the row has no assistant message"
            } else {
                "every assistant message has `loss: false`"
            };
            return Err(RowError::NothingSupervised { reason });
        }
        let images = self.load_images(&conversation.images, base_dir)?;
        let videos = self.load_videos(&conversation.videos, base_dir)?;
        let tokens = self.tokenize(&text, &images, &videos, options.video_markers)?;
        let length = allowed_length(&tokens, options)?;
        let (kept_images, kept_videos) = tokens.media_within(length);
        let mut sample = Sample {
            text,
            supervised,
            ..Sample::default()
        };
        sample.labels = labels(&tokens, &sample.supervised);
        sample.input_ids = tokens.ids;
        sample.mm_token_type_ids = tokens.types;
        sample.input_ids.truncate(length);
        sample.labels.truncate(length);
        sample.mm_token_type_ids.truncate(length);
        if options.require_supervised && sample.supervised_tokens() == 0 {
            return Err(RowError::NothingSupervised {
                reason: "all of it lies behind the cut",
            });
        }
        for image in images.into_iter().take(kept_images) {
            sample.image_grid_thw.push(image.grid_thw);
            append(&mut sample.pixel_values, image.pixel_values);
        }
        for video in videos.into_iter().take(kept_videos) {
            sample.video_grid_thw.push(video.patches.grid_thw);
            append(&mut sample.pixel_values_videos, video.patches.pixel_values);
        }
        Ok(sample)
    }

    fn tokenize(
        &self,
        text: &str,
        images: &[Patches],
        videos: &[VideoPatches],
        markers: VideoMarkers,
    ) -> Result<Tokens, RowError> {
        let tokens_of = |grid: [i64; 3], patches_per_token: usize| {
            let patches: usize = grid
                .iter()
                .map(|&size| usize::try_from(size).unwrap_or(0))
                .product();
            patches / patches_per_token
        };
        let image_tokens: Vec<usize> = self
            .images
            .iter()
            .flat_map(|processor| {
                let per_token = processor.settings.patches_per_token();
                images
                    .iter()
                    .map(move |image| tokens_of(image.grid_thw, per_token))
            })
            .collect();
        let video_tokens: Vec<VideoTokens<'_>> = self
            .videos
            .iter()
            .flat_map(|processor| {
                let per_token = processor.settings.patches_per_token();
                videos.iter().map(move |video| {
                    let [_, height, width] = video.patches.grid_thw;
                    VideoTokens {
                        timestamps: &video.timestamps,
                        tokens: tokens_of([1, height, width], per_token),
                    }
                })
            })
            .collect();
        tokenize(&self.tokenizer, text, &image_tokens, &video_tokens, markers)
    }

    fn load_images(
        &self,
        sources: &[ImageSource],
        base_dir: &Path,
    ) -> Result<Vec<Patches>, RowError> {
        if sources.is_empty() {
            return Ok(Vec::new());
        }
        let processor = self.images.as_ref().ok_or(RowError::NoMediaProcessor {
            kind: "image",
            file: "preprocessor_config.json",
        })?;
        sources
            .iter()
            .map(|source| {
                load(source, base_dir)
                    .and_then(|image| processor.process(&image))
                    .map_err(|error| RowError::Image {
                        name: source.name(),
                        source: error,
                    })
            })
            .collect()
    }

    fn load_videos(
        &self,
        sources: &[VideoSource],
        base_dir: &Path,
    ) -> Result<Vec<VideoPatches>, RowError> {
        if sources.is_empty() {
            return Ok(Vec::new());
        }
        let processor = self.videos.as_ref().ok_or(RowError::NoMediaProcessor {
            kind: "video",
            file: "video_preprocessor_config.json",
        })?;
        sources
            .iter()
            .map(|source| {
                load_video(processor, source, base_dir).map_err(|error| RowError::Video {
                    name: source.name(),
                    source: error,
                })
            })
            .collect()
    }
}

fn load(source: &ImageSource, base_dir: &Path) -> Result<RgbImage, ImageError> {
    match source {
        ImageSource::Base64(data) => load_base64(data),
        ImageSource::Path(path) if is_remote(path) => Err(ImageError::Remote),
        ImageSource::Path(path) => load_image(&base_dir.join(path)),
    }
}

fn load_video(
    processor: &VideoProcessor,
    source: &VideoSource,
    base_dir: &Path,
) -> Result<VideoPatches, VideoError> {
    let (frames, sampling) = match &source.input {
        VideoInput::Path(path) if is_remote(path) => return Err(VideoError::Remote),
        VideoInput::Path(path) => processor.open(&base_dir.join(path), source.sampling)?,
        VideoInput::Frames(frames) => {
            let paths: Option<Vec<PathBuf>> = frames
                .iter()
                .map(|frame| match frame {
                    ImageSource::Path(path) if !is_remote(path) => Some(base_dir.join(path)),
                    _ => None,
                })
                .collect();
            let source_frames = match paths {
                Some(paths) => FrameSource::Files(paths),
                None => FrameSource::Pictures(load_frames(frames, base_dir)?),
            };
            (source_frames, source.sampling)
        }
    };
    processor.process_source(&frames, source.fps, sampling)
}

/// Frames of which some are base64 data.
fn load_frames(frames: &[ImageSource], base_dir: &Path) -> Result<Vec<RgbImage>, VideoError> {
    frames
        .iter()
        .enumerate()
        .map(|(index, frame)| {
            load(frame, base_dir).map_err(|source| VideoError::Frame {
                frame: index,
                name: frame.name(),
                source,
            })
        })
        .collect()
}

fn is_remote(path: &str) -> bool {
    path.starts_with("http://") || path.starts_with("https://")
}

/// The length that the sample gets.
fn allowed_length(tokens: &Tokens, options: &EncodeOptions) -> Result<usize, RowError> {
    let length = tokens.ids.len();
    match options.max_length {
        Some(limit) if length > limit => match options.too_long {
            TooLong::Refuse => Err(RowError::TooLong {
                tokens: length,
                limit,
            }),
            TooLong::Truncate => Ok(tokens.whole_media_length(limit)),
        },
        _ => Ok(length),
    }
}

/// A token is a target when it starts inside a supervised range of the rendered text.
fn labels(tokens: &Tokens, supervised: &[std::ops::Range<usize>]) -> Vec<i64> {
    let mut ranges = supervised.iter().peekable();
    let mut label = |start: usize, id: i64| {
        if start == super::placeholders::INSERTED {
            return IGNORED;
        }
        while ranges.next_if(|range| range.end <= start).is_some() {}
        match ranges.peek() {
            Some(range) if range.contains(&start) => id,
            _ => IGNORED,
        }
    };
    tokens
        .starts
        .iter()
        .zip(&tokens.ids)
        .map(|(&start, &id)| label(start, id))
        .collect()
}

/// Moves rather than copies where it can: pixels are by far the largest part of a sample.
fn append(all: &mut Vec<f32>, mut more: Vec<f32>) {
    if all.is_empty() {
        *all = more;
    } else {
        all.append(&mut more);
    }
}
