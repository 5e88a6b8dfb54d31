//! Bicubic resize with antialiasing on 8-bit RGB, equal to torchvision's uint8 path bit for bit.
//!
//! Two passes, horizontal then vertical, with 16-bit integer weights and 8-bit pixels in between. Defined by: ATen,
//! `UpSampleKernel.cpp`, `_compute_index_ranges_int16_weights` and the uint8 antialias passes (a = -0.5).

use super::image::RgbImage;

/// Resizes `image` to `height` x `width`; the same size gives the same pixels.
pub fn resize(image: &RgbImage, height: usize, width: usize) -> RgbImage {
    let wide = if width == image.width {
        None
    } else {
        Some(RgbImage {
            pixels: horizontal(image, width),
            width,
            height: image.height,
        })
    };
    let source = wide.as_ref().unwrap_or(image);
    if height == source.height {
        return wide.unwrap_or_else(|| image.clone());
    }
    RgbImage {
        pixels: vertical(source, height),
        width,
        height,
    }
}

/// The weights of one axis.
struct Axis {
    /// First source index and number of taps of each output.
    spans: Vec<(usize, usize)>,
    /// Weights of all outputs, one after the other, in units of 2^-precision.
    weights: Vec<i32>,
    precision: u32,
}

/// Taps of a cubic kernel on each side, at scale 1.
const HALF_WIDTH: f64 = 2.0;
/// Where the search for a precision ends.
const MAX_PRECISION: u32 = 22;

impl Axis {
    fn new(from: usize, to: usize) -> Self {
        let scale = from as f64 / to as f64;
        let stretch = scale.max(1.0);
        let support = HALF_WIDTH * stretch;
        let mut spans = Vec::with_capacity(to);
        let mut exact = Vec::new();
        for output in 0..to {
            let center = (output as f64 + 0.5) * scale;
            let first = index(center - support + 0.5);
            let end = index(center + support + 0.5).min(from);
            let start = exact.len();
            let mut total = 0.0;
            for tap in 0..end.saturating_sub(first) {
                let weight = cubic((tap as f64 + first as f64 - center + 0.5) / stretch);
                total += weight;
                exact.push(weight);
            }
            if total != 0.0 {
                for weight in &mut exact[start..] {
                    *weight /= total;
                }
            }
            spans.push((first, exact.len() - start));
        }
        let largest = exact.iter().copied().fold(0.0, f64::max);
        let mut precision = 0;
        while precision < MAX_PRECISION
            && 0.5 + largest * f64::from(1u32 << (precision + 1)) < f64::from(1u32 << 15)
        {
            precision += 1;
        }
        let unit = f64::from(1u32 << precision);
        let weights = exact.iter().map(|weight| rounded(weight * unit)).collect();
        Self {
            spans,
            weights,
            precision,
        }
    }

    /// The spans, each with its weights.
    fn outputs(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let mut start = 0;
        self.spans.iter().map(move |&(first, taps)| {
            let weights = &self.weights[start..start + taps];
            start += taps;
            (first, weights)
        })
    }

    fn half(&self) -> i32 {
        1 << (self.precision - 1)
    }
}

fn horizontal(image: &RgbImage, width: usize) -> Vec<u8> {
    let axis = Axis::new(image.width, width);
    let (half, precision) = (axis.half(), axis.precision);
    let mut out = Vec::with_capacity(width * image.height * 3);
    for row in image.pixels.chunks_exact(image.width * 3) {
        for (first, weights) in axis.outputs() {
            let mut sums = [half; 3];
            for (pixel, &weight) in row[first * 3..].chunks_exact(3).zip(weights) {
                for (sum, &level) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(level) * weight;
                }
            }
            out.extend(sums.map(|sum| level(sum >> precision)));
        }
    }
    out
}

fn vertical(image: &RgbImage, height: usize) -> Vec<u8> {
    let axis = Axis::new(image.height, height);
    let row_bytes = image.width * 3;
    let mut out = Vec::with_capacity(height * row_bytes);
    let mut sums = vec![0; row_bytes];
    for (first, weights) in axis.outputs() {
        sums.fill(axis.half());
        for (row, &weight) in image.pixels[first * row_bytes..]
            .chunks_exact(row_bytes)
            .zip(weights)
        {
            for (sum, &level) in sums.iter_mut().zip(row) {
                *sum += i32::from(level) * weight;
            }
        }
        out.extend(sums.iter().map(|&sum| level(sum >> axis.precision)));
    }
    out
}

/// Keys' cubic with a = -0.5.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "truncation is the definition; negative positions become 0"
)]
fn index(position: f64) -> usize {
    position.max(0.0) as usize
}

/// Half away from zero.
#[expect(
    clippy::cast_possible_truncation,
    reason = "weights are below 2^15 by the choice of the precision"
)]
fn rounded(weight: f64) -> i32 {
    weight.round() as i32
}

/// The nearest byte.
fn level(value: i32) -> u8 {
    value.clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_picture_stays_plain_at_any_size() {
        let image = RgbImage {
            pixels: [10, 200, 30].repeat(7 * 5),
            width: 7,
            height: 5,
        };
        for (height, width) in [(1, 1), (3, 9), (32, 32), (5, 64), (50, 7)] {
            let out = resize(&image, height, width);
            assert_eq!(
                out.pixels,
                [10, 200, 30].repeat(height * width),
                "{height} x {width}"
            );
        }
    }

    #[test]
    fn the_same_size_gives_the_same_pixels() {
        let image = RgbImage {
            pixels: (0..=255).chain(0..44).collect(),
            width: 10,
            height: 10,
        };
        assert_eq!(resize(&image, 10, 10).pixels, image.pixels);
    }
}
