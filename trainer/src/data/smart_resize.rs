//! The size that a picture is brought to: multiples of a factor, within an area, near the own aspect ratio.
//!
//! Defined by: transformers, `smart_resize` of `image_processing_qwen2_vl` and of `video_processing_qwen3_vl`.

use super::error::{ImageError, VideoError};

/// Longer over shorter side from which on a picture is refused.
const MAX_ASPECT_RATIO: f64 = 200.0;

/// The height and width that an image of `height` x `width` pixels is resized to.
///
/// `min_pixels` and `max_pixels` bound the area (`size.shortest_edge` and `size.longest_edge` of the settings).
///
/// # Errors
/// An aspect ratio above 200, or a picture without pixels.
pub fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    min_pixels: u64,
    max_pixels: u64,
) -> Result<(usize, usize), ImageError> {
    if height == 0 || width == 0 {
        return Err(ImageError::Empty { height, width });
    }
    check_aspect_ratio(height, width)?;
    Ok(fit(
        1.0,
        1.0,
        (height as f64, width as f64),
        factor as f64,
        min_pixels,
        max_pixels,
    ))
}

/// The height and width that each frame of a video of `frames` frames is resized to; the area bounds count all frames.
///
/// # Errors
/// Fewer frames than `temporal_factor`, an aspect ratio above 200, or frames without pixels.
pub fn smart_resize_video(
    frames: usize,
    height: usize,
    width: usize,
    temporal_factor: usize,
    factor: usize,
    min_pixels: u64,
    max_pixels: u64,
) -> Result<(usize, usize), VideoError> {
    if frames < temporal_factor {
        return Err(VideoError::TooFewFrames {
            frames,
            temporal_factor,
        });
    }
    if height == 0 || width == 0 {
        return Err(VideoError::Size(ImageError::Empty { height, width }));
    }
    let (mut height, mut width) = (height, width);
    if height < factor || width < factor {
        let scale = (factor as f64 / height as f64).max(factor as f64 / width as f64);
        height = truncate(height as f64 * scale);
        width = truncate(width as f64 * scale);
    }
    check_aspect_ratio(height, width).map_err(VideoError::Size)?;
    let temporal = temporal_factor as f64;
    let rounded_frames = (frames as f64 / temporal).round_ties_even() * temporal;
    let size = (height as f64, width as f64);
    Ok(fit(
        rounded_frames,
        frames as f64,
        size,
        factor as f64,
        min_pixels,
        max_pixels,
    ))
}

/// `rounded_frames` counts in the comparison, `frames` in the scale.
fn fit(
    rounded_frames: f64,
    frames: f64,
    (height, width): (f64, f64),
    factor: f64,
    min_pixels: u64,
    max_pixels: u64,
) -> (usize, usize) {
    let (min_pixels, max_pixels) = (min_pixels as f64, max_pixels as f64);
    let mut rows = (height / factor).round_ties_even() * factor;
    let mut columns = (width / factor).round_ties_even() * factor;
    let area = rounded_frames * rows * columns;
    if area > max_pixels {
        let shrink = (frames * height * width / max_pixels).sqrt();
        rows = factor.max((height / shrink / factor).floor() * factor);
        columns = factor.max((width / shrink / factor).floor() * factor);
    } else if area < min_pixels {
        let grow = (min_pixels / (frames * height * width)).sqrt();
        rows = (height * grow / factor).ceil() * factor;
        columns = (width * grow / factor).ceil() * factor;
    }
    (truncate(rows), truncate(columns))
}

fn check_aspect_ratio(height: usize, width: usize) -> Result<(), ImageError> {
    let ratio = height.max(width) as f64 / height.min(width) as f64;
    if ratio > MAX_ASPECT_RATIO {
        return Err(ImageError::AspectRatio {
            ratio,
            height,
            width,
        });
    }
    Ok(())
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sizes of pictures are positive and far below 2^53"
)]
fn truncate(value: f64) -> usize {
    value as usize
}
