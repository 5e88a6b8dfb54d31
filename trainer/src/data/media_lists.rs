//! Rows that list their media beside the messages (ms-swift, LLaMA-Factory): `<image>` and `<video>` in the texts mark
//! the places, in order.

use std::collections::VecDeque;

use serde_json::{Map, Value as Json, json};

use super::conversation::{Conversation, ImageSource, VideoSource, wrong_type};
use super::error::RowError;

pub(crate) const IMAGE_MARK: &str = "<image>";
pub(crate) const VIDEO_MARK: &str = "<video>";

/// Media that still want a place.
#[derive(Debug)]
pub(crate) struct MediaLists {
    images: Option<List<ImageSource>>,
    videos: Option<List<VideoSource>>,
    /// A newline that only separates a mark from the text goes with the mark (LLaVA).
    pub(crate) newline: Newline,
}

#[derive(Debug)]
struct List<T> {
    waiting: VecDeque<T>,
    listed: usize,
    marks: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Newline {
    Keep,
    DropOne,
}

impl MediaLists {
    /// The lists `images` (or `image`) and `videos` (or `video`) of a row; one entry may stand without a list.
    pub(crate) fn from_row(row: &Map<String, Json>) -> Result<Self, RowError> {
        let entries = |plural: &str, singular: &str| -> Option<Vec<Json>> {
            match row.get(plural).or_else(|| row.get(singular)) {
                None | Some(Json::Null) => None,
                Some(Json::Array(entries)) => Some(entries.clone()),
                Some(one) => Some(vec![one.clone()]),
            }
        };
        let images = entries("images", "image").map(|entries| {
            let sources: Result<VecDeque<_>, RowError> = entries
                .iter()
                .map(|entry| {
                    ImageSource::from_json(entry)
                        .ok_or_else(|| wrong_type("an entry of `images`", entry, "a path"))
                })
                .collect();
            sources.map(List::new)
        });
        let videos = entries("videos", "video").map(|entries| {
            let sources: Result<VecDeque<_>, RowError> = entries
                .iter()
                .map(|entry| {
                    VideoSource::from_json(entry)?.ok_or_else(|| {
                        wrong_type("an entry of `videos`", entry, "a path or frames")
                    })
                })
                .collect();
            sources.map(List::new)
        });
        Ok(Self {
            images: images.transpose()?,
            videos: videos.transpose()?,
            newline: Newline::Keep,
        })
    }

    /// Every mark counts, whether the row lists media or not: LLaVA texts have no other use for them.
    pub(crate) fn always(mut self) -> Self {
        self.images
            .get_or_insert_with(|| List::new(VecDeque::new()));
        self.videos
            .get_or_insert_with(|| List::new(VecDeque::new()));
        self
    }

    /// `text` with its marks made parts, and their media moved into the conversation; text without marks as it is.
    pub(crate) fn place(
        &mut self,
        text: &str,
        conversation: &mut Conversation,
    ) -> Result<Json, RowError> {
        let mut parts = Vec::new();
        let mut rest = text;
        loop {
            let image = self.images.as_ref().and_then(|_| rest.find(IMAGE_MARK));
            let video = self.videos.as_ref().and_then(|_| rest.find(VIDEO_MARK));
            let (at, mark) = match (image, video) {
                (None, None) => break,
                (Some(image), Some(video)) if video < image => (video, VIDEO_MARK),
                (Some(image), _) => (image, IMAGE_MARK),
                (None, Some(video)) => (video, VIDEO_MARK),
            };
            let (mut before, mut after) = (&rest[..at], &rest[at + mark.len()..]);
            if self.newline == Newline::DropOne {
                match after.strip_prefix('\n') {
                    Some(stripped) => after = stripped,
                    None => before = before.strip_suffix('\n').unwrap_or(before),
                }
            }
            push_text(&mut parts, before);
            if mark == VIDEO_MARK {
                conversation.videos.extend(self.next_video());
                parts.push(json!({"type": "video", "video": ""}));
            } else {
                conversation.images.extend(self.next_image());
                parts.push(json!({"type": "image", "image": ""}));
            }
            rest = after;
        }
        if parts.is_empty() {
            return Ok(Json::from(text));
        }
        push_text(&mut parts, rest);
        Ok(Json::Array(parts))
    }

    pub(crate) fn next_image(&mut self) -> Option<ImageSource> {
        self.images.as_mut()?.next()
    }

    pub(crate) fn next_video(&mut self) -> Option<VideoSource> {
        self.videos.as_mut()?.next()
    }

    /// Checks that there was one mark for each listed medium.
    pub(crate) fn finish(self) -> Result<(), RowError> {
        if let Some(List { listed, marks, .. }) = self.images.filter(List::is_uneven) {
            return Err(RowError::MediaCount {
                mark: IMAGE_MARK,
                marks,
                kind: "image",
                listed,
            });
        }
        if let Some(List { listed, marks, .. }) = self.videos.filter(List::is_uneven) {
            return Err(RowError::MediaCount {
                mark: VIDEO_MARK,
                marks,
                kind: "video",
                listed,
            });
        }
        Ok(())
    }
}

impl<T> List<T> {
    fn new(waiting: VecDeque<T>) -> Self {
        Self {
            listed: waiting.len(),
            waiting,
            marks: 0,
        }
    }

    fn next(&mut self) -> Option<T> {
        self.marks += 1;
        self.waiting.pop_front()
    }

    fn is_uneven(&self) -> bool {
        self.marks != self.listed
    }
}

fn push_text(parts: &mut Vec<Json>, text: &str) {
    if !text.is_empty() {
        parts.push(json!({"type": "text", "text": text}));
    }
}
