//! Video files through the `ffmpeg` program over a pipe: nothing to build, and its decoders stay in another process.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use super::error::VideoError;
use super::image::{RgbImage, check_size};

/// What a video file holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Probe {
    pub(crate) frames: usize,
    pub(crate) fps: Option<f64>,
}

/// Counts the frames of the first video stream, without decoding them, and finds their rate.
///
/// # Errors
/// [`VideoError::NoFfmpeg`] without the program, [`VideoError::Ffmpeg`] with its last line when it fails.
pub(crate) fn probe(file: &Path) -> Result<Probe, VideoError> {
    let output = command(file)
        .args(["-map", "0:v:0", "-c", "copy", "-f", "null", "-"])
        .stdin(Stdio::null())
        .output()
        .map_err(start_error)?;
    let report = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(VideoError::Ffmpeg {
            detail: last_line(&report),
        });
    }
    parse_report(&report).ok_or_else(|| VideoError::Ffmpeg {
        detail: "it reports no frames".into(),
    })
}

/// The frames at `indices` (ascending), decoded one after the other.
///
/// # Errors
/// [`VideoError::NoFfmpeg`] without the program.
pub(crate) fn frames(file: &Path, indices: &[usize]) -> Result<Frames, VideoError> {
    let chosen: Vec<String> = indices
        .iter()
        .map(|index| format!("eq(n\\,{index})"))
        .collect();
    let mut child = command(file)
        .args([
            "-map",
            "0:v:0",
            "-an",
            "-sn",
            "-vf",
            &format!("select={}", chosen.join("+")),
        ])
        .args([
            "-fps_mode",
            "passthrough",
            "-c:v",
            "ppm",
            "-f",
            "image2pipe",
            "-",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(start_error)?;
    let stdout = child.stdout.take().map(BufReader::new);
    Ok(Frames {
        child,
        stdout,
        index: 0,
        indices: indices.to_vec(),
    })
}

/// Frames as ffmpeg writes them; the program is stopped when this is dropped.
pub(crate) struct Frames {
    child: Child,
    stdout: Option<BufReader<ChildStdout>>,
    index: usize,
    indices: Vec<usize>,
}

impl Iterator for Frames {
    type Item = Result<RgbImage, VideoError>;

    fn next(&mut self) -> Option<Self::Item> {
        let frame = *self.indices.get(self.index)?;
        self.index += 1;
        let stdout = self.stdout.as_mut()?;
        match read_ppm(stdout) {
            Ok(Some(image)) => Some(Ok(image)),
            Ok(None) => None,
            Err(detail) => Some(Err(VideoError::Ffmpeg {
                detail: format!("frame {frame}: {detail}"),
            })),
        }
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.stdout = None;
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(file: &Path) -> Command {
    let mut command = Command::new("ffmpeg");
    let mut input = std::ffi::OsString::from("file:");
    input.push(file);
    command
        .args([
            "-nostdin",
            "-hide_banner",
            "-protocol_whitelist",
            "file,pipe",
            "-i",
        ])
        .arg(input);
    command
}

fn start_error(error: std::io::Error) -> VideoError {
    match error.kind() {
        std::io::ErrorKind::NotFound => VideoError::NoFfmpeg,
        _ => VideoError::Read(error),
    }
}

fn last_line(report: &str) -> String {
    report
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no message")
        .trim()
        .to_owned()
}

/// `frame=  123` (the last one) and `25 fps` of the stream's line.
fn parse_report(report: &str) -> Option<Probe> {
    let after = report.rsplit_once("frame=")?.1.trim_start();
    let digits = after
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(after.len());
    let frames = after[..digits].parse().ok()?;
    let fps = report
        .lines()
        .find(|line| line.contains("Video:"))
        .and_then(|line| {
            line.split(',')
                .find_map(|part| part.trim().strip_suffix(" fps")?.parse().ok())
        });
    Some(Probe { frames, fps })
}

/// Reads one binary PPM picture, `None` at the end of the stream.
fn read_ppm(input: &mut impl BufRead) -> Result<Option<RgbImage>, String> {
    let mut fields = Vec::new();
    let mut line = String::new();
    while fields.len() < 4 {
        line.clear();
        let read = input
            .take(256)
            .read_line(&mut line)
            .map_err(|error| error.to_string())?;
        if read == 0 {
            return if fields.is_empty() {
                Ok(None)
            } else {
                Err("the picture is cut short".into())
            };
        }
        fields.extend(line.split_ascii_whitespace().map(str::to_owned));
    }
    let number = |index: usize| {
        fields[index]
            .parse::<usize>()
            .map_err(|error| error.to_string())
    };
    if fields[0] != "P6" || fields[3] != "255" {
        return Err("not an 8-bit PPM picture".into());
    }
    let (width, height) = (number(1)?, number(2)?);
    check_size(width as u64, height as u64).map_err(|error| error.to_string())?;
    let mut pixels = vec![0; width * height * 3];
    input
        .read_exact(&mut pixels)
        .map_err(|_| "the picture is cut short".to_owned())?;
    Ok(Some(RgbImage {
        pixels,
        width,
        height,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_gives_frames_and_rate() {
        let report = "  Stream #0:0(und): Video: h264 (High), yuv420p, 640x360, 612 kb/s, 29.97 fps, 30 tbr\n\
            frame=   10 fps=0.0 q=-1.0\rframe=  300 fps=0.0 q=-1.0 Lsize=N/A";
        assert_eq!(
            parse_report(report),
            Some(Probe {
                frames: 300,
                fps: Some(29.97)
            })
        );
        assert_eq!(parse_report("nothing"), None);
    }

    #[test]
    fn pictures_are_read_one_after_the_other() {
        let mut stream: &[u8] = b"P6\n2 1\n255\nabcdefP6\n1 1\n255\nxyzP6\n9 9\n255\nq";
        assert_eq!(read_ppm(&mut stream).unwrap().unwrap().pixels, b"abcdef");
        assert_eq!(read_ppm(&mut stream).unwrap().unwrap().pixels, b"xyz");
        assert!(read_ppm(&mut stream).is_err());
        assert_eq!(read_ppm(&mut stream), Ok(None));
    }

    #[test]
    fn a_picture_that_lies_about_its_size_is_refused() {
        let mut stream: &[u8] = b"P6\n60000 60000\n255\nabc";
        assert!(read_ppm(&mut stream).unwrap_err().contains("60000 x 60000"));
    }
}
