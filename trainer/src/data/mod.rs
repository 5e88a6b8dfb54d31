//! Chat data: rows, chat template, tokenizer, images and videos, samples.
//!
//! [`Dataset`] finds the rows of a file, [`Processor`] makes a [`Sample`] of one of them. Both are immutable once
//! opened, so that many threads may read and encode at once; nothing here knows of tensors, batches or training.
//!
//! Invariants:
//! - the checkpoint's own template, tokenizer and processor settings decide; no vocabulary or wording is built in
//!   beyond the turn markers that the label rule names (`labels.rs`);
//! - every error of a row names the file and the row, and never ends the process;
//! - sizes are known (and capped) from headers before anything is decoded.

mod conversation;
mod dataset;
mod error;
mod ffmpeg;
mod image;
mod jpeg;
mod labels;
mod llava;
mod media_lists;
mod openai;
mod patches;
mod placeholders;
mod processor;
mod python;
mod resize;
mod smart_resize;
mod template;
mod tokenizer;
mod video;

pub use dataset::{Dataset, Row};
pub use error::{DataError, ImageError, RowError, TemplateError, VideoError};
pub use image::{RgbImage, load_image};
pub use patches::{ImageProcessor, Patches};
pub use placeholders::VideoMarkers;
pub use processor::{EncodeOptions, Processor, Sample, TooLong};
pub use resize::resize;
pub use smart_resize::{smart_resize, smart_resize_video};
pub use template::ChatTemplate;
pub use tokenizer::ChatTokenizer;
pub use video::{VideoPatches, VideoProcessor, VideoSampling};
