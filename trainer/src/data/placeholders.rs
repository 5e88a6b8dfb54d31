//! Rendered text to token ids: each placeholder becomes as many as its medium has tokens.
//!
//! Placeholders are added tokens, which the tokenizer cuts out of the raw text before anything else. So the text
//! between them is tokenized piece by piece, and the ids between are written directly: equal to tokenizing the
//! expanded text, without building it.

use std::ops::Range;

use super::error::RowError;
use super::tokenizer::ChatTokenizer;

/// What surrounds the patches of a video.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VideoMarkers {
    /// The template's `<|vision_start|>` and `<|vision_end|>` stay around the timestamps and the inner pairs, as in
    /// transformers 5.
    #[default]
    Nested,
    /// The template's pair is replaced, as older releases did.
    Replaced,
}

/// A video's share of the text.
#[derive(Debug, Clone)]
pub(crate) struct VideoTokens<'a> {
    /// Seconds, one a temporal patch.
    pub(crate) timestamps: &'a [f64],
    /// Tokens of one temporal patch.
    pub(crate) tokens: usize,
}

/// Tokenized text with its media in place.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    pub(crate) ids: Vec<i64>,
    /// Where each token starts in the rendered text; tokens that stand for media have [`INSERTED`].
    pub(crate) starts: Vec<usize>,
    /// 1 for image tokens, 2 for video tokens, 0 for text.
    pub(crate) types: Vec<i64>,
    /// Tokens of each medium with the markers around it, in order.
    pub(crate) media: Vec<(MediaKind, Range<usize>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MediaKind {
    Image,
    Video,
}

/// The start of a token that is not in the rendered text.
pub(crate) const INSERTED: usize = usize::MAX;

/// Tokenizes `text`, giving the k-th image placeholder `images[k]` tokens and the k-th video `videos[k]`.
///
/// # Errors
/// [`RowError::PlaceholderCount`] when there are more or fewer placeholders than media.
pub(crate) fn tokenize(
    tokenizer: &ChatTokenizer,
    text: &str,
    images: &[usize],
    videos: &[VideoTokens<'_>],
    markers: VideoMarkers,
) -> Result<Tokens, RowError> {
    let (image_token, image_id) = tokenizer.image_token();
    let (video_token, video_id) = tokenizer.video_token();
    for (kind, token, media) in [
        ("image", image_token, images.len()),
        ("video", video_token, videos.len()),
    ] {
        let placeholders = text.matches(token).count();
        if placeholders != media {
            return Err(RowError::PlaceholderCount {
                kind,
                placeholders,
                media,
            });
        }
    }
    let (before_mark, after_mark) = tokenizer.vision_markers();
    let (start_id, end_id) = (
        tokenizer.token_id(before_mark),
        tokenizer.token_id(after_mark),
    );
    let (mut images, mut videos) = (images.iter(), videos.iter());
    let mut out = Tokens::default();
    let mut from = 0;
    while let Some((at, kind)) = next_placeholder(text, from, image_token, video_token) {
        let (mut before, mut after) = (at, at);
        match kind {
            MediaKind::Image => after += image_token.len(),
            MediaKind::Video => after += video_token.len(),
        }
        if kind == MediaKind::Video
            && markers == VideoMarkers::Replaced
            && text[..before].ends_with(before_mark)
            && text[after..].starts_with(after_mark)
        {
            before -= before_mark.len();
            after += after_mark.len();
        }
        out.push_text(tokenizer, text, from..before)?;
        let surrounded = out.ids.last().is_some_and(|&id| Some(id) == start_id);
        let start = out.ids.len() - usize::from(surrounded);
        match kind {
            MediaKind::Image => {
                out.push_inserted(image_id, images.next().copied().unwrap_or(0), 1);
            }
            MediaKind::Video => {
                let Some(video) = videos.next() else { continue };
                for seconds in video.timestamps {
                    for id in tokenizer.encode(&format!("<{seconds:.1} seconds>{before_mark}"))? {
                        out.push_inserted(id, 1, 0);
                    }
                    out.push_inserted(video_id, video.tokens, 2);
                    for id in tokenizer.encode(after_mark)? {
                        out.push_inserted(id, 1, 0);
                    }
                }
            }
        }
        out.media.push((kind, start..out.ids.len()));
        from = after;
    }
    out.push_text(tokenizer, text, from..text.len())?;
    for (_, range) in &mut out.media {
        if out.ids.get(range.end).is_some_and(|&id| Some(id) == end_id) {
            range.end += 1;
        }
    }
    Ok(out)
}

fn next_placeholder(
    text: &str,
    from: usize,
    image: &str,
    video: &str,
) -> Option<(usize, MediaKind)> {
    let image = text[from..]
        .find(image)
        .map(|at| (from + at, MediaKind::Image));
    let video = text[from..]
        .find(video)
        .map(|at| (from + at, MediaKind::Video));
    match (image, video) {
        (Some(image), Some(video)) => Some(if image.0 < video.0 { image } else { video }),
        (image, video) => image.or(video),
    }
}

impl Tokens {
    fn push_text(
        &mut self,
        tokenizer: &ChatTokenizer,
        text: &str,
        range: Range<usize>,
    ) -> Result<(), RowError> {
        if range.is_empty() {
            return Ok(());
        }
        let encoded = tokenizer.encode_with_starts(&text[range.clone()])?;
        self.types.resize(self.types.len() + encoded.ids.len(), 0);
        self.ids.extend(encoded.ids);
        self.starts
            .extend(encoded.starts.iter().map(|start| start + range.start));
        Ok(())
    }

    fn push_inserted(&mut self, id: i64, count: usize, kind: i64) {
        let len = self.ids.len() + count;
        self.ids.resize(len, id);
        self.starts.resize(len, INSERTED);
        self.types.resize(len, kind);
    }

    /// The longest length of at most `limit` tokens that cuts through no image and no video.
    pub(crate) fn whole_media_length(&self, limit: usize) -> usize {
        self.media
            .iter()
            .find(|(_, range)| range.start < limit && limit < range.end)
            .map_or(limit, |(_, range)| range.start)
    }

    /// Images and videos that lie whole within the first `length` tokens.
    pub(crate) fn media_within(&self, length: usize) -> (usize, usize) {
        let count = |wanted: MediaKind| {
            self.media
                .iter()
                .filter(|(kind, range)| *kind == wanted && range.end <= length)
                .count()
        };
        (count(MediaKind::Image), count(MediaKind::Video))
    }
}
