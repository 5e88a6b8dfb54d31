//! JPEG through libjpeg's own arithmetic: other decoders differ by up to 7 levels on files with halved colour.

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use mozjpeg::{ALL_MARKERS, ColorSpace, Decompress, Marker};

use super::error::ImageError;
use super::image::{RgbImage, check_size, oriented};

const FORMAT: &str = "JPEG";

/// Decodes a JPEG file: gray, YCbCr, RGB, CMYK and YCCK; EXIF orientation applied.
pub(crate) fn decode(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    // libjpeg fills what is missing with gray and calls it a warning.
    if !has_end_marker(bytes) {
        return Err(ImageError::Truncated { format: FORMAT });
    }
    // libjpeg's fatal errors come as unwinding that carries its message.
    catch_unwind(AssertUnwindSafe(|| decode_inner(bytes))).unwrap_or_else(|payload| {
        let detail = payload
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| "the decoder failed".into());
        Err(failed(detail))
    })
}

fn decode_inner(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    let io = |error: std::io::Error| failed(error.to_string());
    let decoder = Decompress::with_markers(ALL_MARKERS)
        .from_mem(bytes)
        .map_err(io)?;
    let (width, height) = decoder.size();
    check_size(width as u64, height as u64)?;
    let mut orientation = Orientation::NoTransforms;
    let mut inverted = false;
    for marker in decoder.markers() {
        match marker.marker {
            Marker::APP(1) => {
                if let Some(chunk) = marker.data.strip_prefix(b"Exif\0\0") {
                    orientation = Orientation::from_exif_chunk(chunk).unwrap_or(orientation);
                }
            }
            Marker::APP(14) => inverted |= marker.data.starts_with(b"Adobe"),
            _ => {}
        }
    }
    let four_channels = matches!(
        decoder.color_space(),
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK
    );
    let pixels = if four_channels {
        let mut started = decoder.to_colorspace(ColorSpace::JCS_CMYK).map_err(io)?;
        let cmyk: Vec<[u8; 4]> = started.read_scanlines().map_err(io)?;
        started.finish().map_err(io)?;
        cmyk.into_iter()
            .flat_map(|pixel| rgb_of_cmyk(pixel, inverted))
            .collect()
    } else {
        let mut started = decoder.rgb().map_err(io)?;
        let pixels: Vec<u8> = started.read_scanlines().map_err(io)?;
        started.finish().map_err(io)?;
        pixels
    };
    if pixels.len() != width * height * 3 {
        return Err(ImageError::Truncated { format: FORMAT });
    }
    Ok(oriented(
        RgbImage {
            pixels,
            width,
            height,
        },
        orientation,
    ))
}

/// (255 - C) (255 - K) / 255, in Pillow's integers; Adobe's files hold inverted values.
fn rgb_of_cmyk(pixel: [u8; 4], inverted: bool) -> [u8; 3] {
    let [c, m, y, k] = if inverted {
        pixel.map(|level| !level)
    } else {
        pixel
    };
    let light = 255 - i32::from(k);
    [c, m, y].map(|ink| {
        let product = i32::from(ink) * light + 128;
        let ink_part = ((product >> 8) + product) >> 8;
        u8::try_from((light - ink_part).clamp(0, 255)).unwrap_or(u8::MAX)
    })
}

fn failed(detail: String) -> ImageError {
    ImageError::Decode {
        format: FORMAT,
        detail,
    }
}

/// Whether an end marker follows the first scan; thumbnails in the header's segments do not count.
fn has_end_marker(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[0xFF, marker, ref rest @ ..]) = bytes.get(at..) {
        match marker {
            0xFF => at += 1,
            0x01 | 0xD0..=0xD8 => at += 2,
            0xD9 => return true,
            0xDA => return rest.windows(2).any(|pair| pair == [0xFF, 0xD9]),
            _ => match rest {
                [high, low, ..] => at += 2 + usize::from(u16::from_be_bytes([*high, *low])),
                _ => return false,
            },
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ink_and_light_mix_as_pillow_does() {
        assert_eq!(rgb_of_cmyk([0, 0, 0, 0], false), [255; 3]);
        assert_eq!(rgb_of_cmyk([255, 0, 128, 0], false), [0, 255, 127]);
        assert_eq!(
            rgb_of_cmyk([0, 100, 255, 200], true),
            rgb_of_cmyk([255, 155, 0, 55], false)
        );
    }

    #[test]
    fn rubbish_and_cut_files_are_errors() {
        assert!(decode(&[0xFF, 0xD8, 0xFF]).is_err());
        assert!(decode(b"\xFF\xD8\xFF\xDB\x00\x04ab\xFF\xD9").is_err());
        assert!(decode(&[0xFF, 0xD8, 0xFF, 0xDA, 0, 2, 1, 2, 3, 0xFF, 0xD9]).is_err());
    }
}
