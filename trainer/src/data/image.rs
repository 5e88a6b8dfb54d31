//! Pictures of any enabled format as 8-bit RGB, as transformers' `load_image` and its processor see them.
//!
//! Rules: EXIF orientation is applied; alpha is dropped and the colours under it kept; gray is copied to three
//! channels; 16-bit colours keep their high byte, 16-bit gray is clipped to 255 as the reference does (with a warning,
//! since the picture is lost); the first frame of an animation counts.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::error::ImageError;
use super::jpeg;

/// Pixels that a picture may have: the number above which Pillow too refuses.
pub(crate) const MAX_PIXELS: u64 = 178_956_970;
/// Bytes that a decoder may allocate beside the picture.
const MAX_DECODER_BYTES: u64 = 1 << 31;

/// 8-bit RGB, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    /// `height * width * 3` levels.
    pub pixels: Vec<u8>,
    /// Pixels a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// Reads the picture at `path`.
///
/// # Errors
/// What is wrong with the file; the caller knows its name.
pub fn load_image(path: &Path) -> Result<RgbImage, ImageError> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ImageError::Missing);
        }
        Err(error) => return Err(ImageError::Read(error)),
    };
    // A pipe or a device could block for ever.
    if !metadata.is_file() {
        return Err(ImageError::NotAFile);
    }
    let bytes = std::fs::read(path).map_err(ImageError::Read)?;
    let (image, warning) = decode(&bytes)?;
    if let Some(warning) = warning {
        tracing::warn!(file = %path.display(), "{warning}");
    }
    Ok(image)
}

/// Reads a picture from base64 text, with or without a `data:...;base64,` in front.
pub(crate) fn load_base64(text: &str) -> Result<RgbImage, ImageError> {
    let data = match text.strip_prefix("data:") {
        Some(rest) => rest.split_once(";base64,").ok_or(ImageError::Base64)?.1,
        None => text,
    };
    let data: String = data.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let bytes = STANDARD.decode(data).map_err(|_| ImageError::Base64)?;
    decode(&bytes).map(|(image, _)| image)
}

type Decoded = (RgbImage, Option<&'static str>);

/// Decodes a whole file's bytes. A decoder that panics is an error of this picture, no more.
pub(crate) fn decode(bytes: &[u8]) -> Result<Decoded, ImageError> {
    let (format, name) = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => (ImageFormat::Jpeg, "JPEG"),
        Ok(ImageFormat::Png) => (ImageFormat::Png, "PNG"),
        Ok(ImageFormat::WebP) => (ImageFormat::WebP, "WebP"),
        Ok(ImageFormat::Gif) => (ImageFormat::Gif, "GIF"),
        Ok(ImageFormat::Bmp) => (ImageFormat::Bmp, "BMP"),
        _ => return Err(ImageError::UnknownFormat),
    };
    catch_unwind(AssertUnwindSafe(|| match format {
        ImageFormat::Jpeg => Ok((jpeg::decode(bytes)?, None)),
        _ => decode_with_image(bytes, format, name),
    }))
    .unwrap_or_else(|_| {
        Err(ImageError::Decode {
            format: name,
            detail: "the decoder failed on this file".into(),
        })
    })
}

fn decode_with_image(
    bytes: &[u8],
    format: ImageFormat,
    name: &'static str,
) -> Result<Decoded, ImageError> {
    let failed = |error: image::ImageError| decode_error(&error, name);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    check_size(u64::from(width), u64::from(height))?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder).map_err(failed)?;
    let warning = matches!(image, DynamicImage::ImageLuma16(_)).then_some(
        "a 16-bit gray picture: levels above 255 become white, as in the reference; save it with 8 bits",
    );
    Ok((oriented(to_rgb(image), orientation), warning))
}

/// Refuses a picture whose header promises more than is ever decoded.
pub(crate) fn check_size(width: u64, height: u64) -> Result<(), ImageError> {
    if width.saturating_mul(height) > MAX_PIXELS {
        return Err(ImageError::TooLarge {
            width,
            height,
            limit: MAX_PIXELS,
        });
    }
    Ok(())
}

fn to_rgb(image: DynamicImage) -> RgbImage {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let high = |level: u16| level.to_be_bytes()[0];
    let clipped = |level: u16| u8::try_from(level).unwrap_or(u8::MAX);
    let pixels = match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageLuma8(image) => {
            image.into_raw().into_iter().flat_map(|l| [l; 3]).collect()
        }
        DynamicImage::ImageLumaA8(image) => image
            .into_raw()
            .chunks_exact(2)
            .flat_map(|p| [p[0]; 3])
            .collect(),
        DynamicImage::ImageRgba8(image) => image
            .into_raw()
            .chunks_exact(4)
            .flat_map(|p| [p[0], p[1], p[2]])
            .collect(),
        DynamicImage::ImageLuma16(image) => image
            .into_raw()
            .into_iter()
            .flat_map(|l| [clipped(l); 3])
            .collect(),
        DynamicImage::ImageLumaA16(image) => image
            .into_raw()
            .chunks_exact(2)
            .flat_map(|p| [high(p[0]); 3])
            .collect(),
        DynamicImage::ImageRgb16(image) => image.into_raw().into_iter().map(high).collect(),
        DynamicImage::ImageRgba16(image) => image
            .into_raw()
            .chunks_exact(4)
            .flat_map(|p| [high(p[0]), high(p[1]), high(p[2])])
            .collect(),
        other => other.into_rgb8().into_raw(),
    };
    RgbImage {
        pixels,
        width,
        height,
    }
}

/// Turns and mirrors a picture as its EXIF orientation says.
pub(crate) fn oriented(image: RgbImage, orientation: Orientation) -> RgbImage {
    if orientation == Orientation::NoTransforms {
        return image;
    }
    let (width, height) = (image.width, image.height);
    // Where the pixel at (row, column) of the result comes from.
    let swapped = matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    );
    let (new_height, new_width) = if swapped {
        (width, height)
    } else {
        (height, width)
    };
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for row in 0..new_height {
        for column in 0..new_width {
            let (y, x) = match orientation {
                Orientation::NoTransforms => (row, column),
                Orientation::FlipHorizontal => (row, width - 1 - column),
                Orientation::Rotate180 => (height - 1 - row, width - 1 - column),
                Orientation::FlipVertical => (height - 1 - row, column),
                Orientation::Rotate90FlipH => (column, row),
                Orientation::Rotate90 => (height - 1 - column, row),
                Orientation::Rotate270FlipH => (height - 1 - column, width - 1 - row),
                Orientation::Rotate270 => (column, width - 1 - row),
            };
            let at = (y * width + x) * 3;
            pixels.extend_from_slice(&image.pixels[at..at + 3]);
        }
    }
    RgbImage {
        pixels,
        width: new_width,
        height: new_height,
    }
}

fn decode_error(error: &image::ImageError, format: &'static str) -> ImageError {
    match error {
        image::ImageError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated { format }
        }
        other => ImageError::Decode {
            format,
            detail: other.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn png(width: u32, height: u32, color: image::ExtendedColorType, levels: &[u8]) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        image::write_buffer_with_format(&mut out, levels, width, height, color, ImageFormat::Png)
            .unwrap();
        out.into_inner()
    }

    #[test]
    fn a_header_of_sixty_thousand_squared_is_refused_before_decoding() {
        let mut file = png(1, 1, image::ExtendedColorType::Rgb8, &[1, 2, 3]);
        file[16..20].copy_from_slice(&60_000u32.to_be_bytes());
        file[20..24].copy_from_slice(&60_000u32.to_be_bytes());
        let crc = crc32(&file[12..29]);
        file[29..33].copy_from_slice(&crc.to_be_bytes());
        file.truncate(100);
        let error = decode(&file).unwrap_err();
        assert!(
            matches!(error, ImageError::TooLarge { width: 60_000, .. }),
            "{error:?}"
        );
    }

    #[test]
    fn a_cut_png_is_an_error_at_every_length() {
        let levels: Vec<u8> = (0..48).collect();
        let file = png(4, 4, image::ExtendedColorType::Rgb8, &levels);
        assert_eq!(decode(&file).unwrap().0.pixels, levels);
        for length in 0..file.len() - 16 {
            assert!(decode(&file[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn alpha_is_dropped_and_the_colours_kept() {
        let file = png(
            1,
            2,
            image::ExtendedColorType::Rgba8,
            &[9, 8, 7, 0, 6, 5, 4, 255],
        );
        assert_eq!(decode(&file).unwrap().0.pixels, [9, 8, 7, 6, 5, 4]);
    }

    #[test]
    fn orientations_six_and_eight_are_inverse() {
        let image = RgbImage {
            pixels: (0..18).collect(),
            width: 3,
            height: 2,
        };
        let turned = oriented(image.clone(), Orientation::Rotate90);
        assert_eq!((turned.width, turned.height), (2, 3));
        assert_eq!(turned.pixels[..3], image.pixels[9..12]);
        assert_eq!(oriented(turned, Orientation::Rotate270), image);
    }

    #[test]
    fn errors_hold_no_addresses() {
        let error = decode(b"\x89PNG\r\n\x1a\nrubbish").unwrap_err().to_string();
        assert!(!error.contains("0x"), "{error}");
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                if crc & 1 == 1 {
                    (crc >> 1) ^ 0xEDB8_8320
                } else {
                    crc >> 1
                }
            })
        })
    }
}
