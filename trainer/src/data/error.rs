//! What can be wrong with a data set, one of its rows, or the files that say how to read them.

use std::path::PathBuf;

/// A file that cannot be used, or a row of one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not a data set.
    #[error("{} is not a data set: {reason}", file.display())]
    NotADataset {
        /// The file.
        file: PathBuf,
        /// What was found.
        reason: &'static str,
    },
    /// A row number past the end.
    #[error("{} has {len} rows; there is no row {row}", file.display())]
    NoSuchRow {
        /// The file.
        file: PathBuf,
        /// The row asked for.
        row: usize,
        /// Rows that exist.
        len: usize,
    },
    /// A file that a checkpoint directory should have.
    #[error("{} has no `{name}`, which is needed to {purpose}; copy it from the model's page", dir.display())]
    MissingFile {
        /// The checkpoint directory.
        dir: PathBuf,
        /// The absent file.
        name: &'static str,
        /// What it is for.
        purpose: &'static str,
    },
    /// JSON that does not parse.
    #[error("{} is not valid JSON", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A setting that cannot be used.
    #[error("`{key}` in {} is {found}; expected {expected}", file.display())]
    Setting {
        /// The file.
        file: PathBuf,
        /// The setting.
        key: &'static str,
        /// Its value, as JSON.
        found: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A tokenizer.json that the tokenizers library refuses.
    #[error("{} cannot be read as a tokenizer: {detail}", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// The library's words.
        detail: String,
    },
    /// An added token that would get another id than the checkpoint says.
    #[error("{} gives the token `{token}` the id {expected}, but the tokenizer gives it {found}; are the files from the same model?", file.display())]
    AddedToken {
        /// tokenizer_config.json.
        file: PathBuf,
        /// The token.
        token: String,
        /// Its id there.
        expected: u32,
        /// Its id in the tokenizer.
        found: u32,
    },
    /// A chat template that does not parse.
    #[error("the chat template {} does not parse", file.display())]
    Template {
        /// The template's file.
        file: PathBuf,
        /// Where and why.
        #[source]
        source: TemplateError,
    },
    /// A row that cannot become a sample.
    #[error("{}, row {row}: {cause}", file.display())]
    Row {
        /// The data file.
        file: PathBuf,
        /// The row, counted from 0.
        row: usize,
        /// What is wrong with it.
        cause: Box<RowError>,
    },
}

/// What is wrong with one row.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// JSON that does not parse.
    #[error("not valid JSON: {0}")]
    Json(serde_json::Error),
    /// The bytes of the row cannot be read.
    #[error("cannot be read: {0}")]
    Read(std::io::Error),
    /// Something else than an object.
    #[error("a row is a JSON object, this is {found}")]
    NotAnObject {
        /// The JSON type found.
        found: &'static str,
    },
    /// An integer that would lose digits.
    #[error("the integer {digits} needs more than 64 bits; write it as a string or a float")]
    HugeInteger {
        /// The digits.
        digits: String,
    },
    /// Neither messages nor conversations.
    #[error("no `messages` and no `conversations`; the keys are {}", keys.join(", "))]
    NoMessages {
        /// The keys found.
        keys: Vec<String>,
    },
    /// A key that looks like a misspelt one.
    #[error("unknown key `{key}` in {place}; did you mean `{nearest}`?")]
    MisspeltKey {
        /// The key.
        key: String,
        /// Where it stands.
        place: &'static str,
        /// The known key it resembles.
        nearest: &'static str,
    },
    /// A value of the wrong type.
    #[error("{place} is {found}; expected {expected}")]
    WrongType {
        /// Which value.
        place: String,
        /// The JSON type found.
        found: &'static str,
        /// The types that would be right.
        expected: &'static str,
    },
    /// A speaker of a ShareGPT conversation that is not known.
    #[error("turn {turn} is from `{found}`; expected human, user, gpt, assistant, system or tool")]
    UnknownSpeaker {
        /// The turn, counted from 0.
        turn: usize,
        /// The `from` value.
        found: String,
    },
    /// A media part that names no source.
    #[error("{kind} part without a source; give it one of {}", keys.join(", "))]
    NoSource {
        /// `image` or `video`, with its article.
        kind: &'static str,
        /// The accepted keys.
        keys: &'static [&'static str],
    },
    /// Marks in the text and a media list that disagree.
    #[error(
        "the text has {marks} `{mark}` but the row lists {listed} {kind}s; there must be one mark for each"
    )]
    MediaCount {
        /// The mark.
        mark: &'static str,
        /// Marks in the text.
        marks: usize,
        /// `image` or `video`.
        kind: &'static str,
        /// Entries in the list.
        listed: usize,
    },
    /// The template wrote another number of placeholders than there are media.
    #[error("the chat template wrote {placeholders} {kind} placeholders for {media} {kind}s")]
    PlaceholderCount {
        /// `image` or `video`.
        kind: &'static str,
        /// Placeholders rendered.
        placeholders: usize,
        /// Media in the row.
        media: usize,
    },
    /// A control token written out in a text.
    #[error(
        "{place} contains the control token `{token}`; the tokenizer would take it as control, remove or rewrite it"
    )]
    ControlToken {
        /// Which text.
        place: String,
        /// The token.
        token: String,
    },
    /// An image that cannot be used.
    #[error("image {name}: {source}")]
    Image {
        /// Its path, or what it is.
        name: String,
        /// Why.
        source: ImageError,
    },
    /// A video that cannot be used.
    #[error("video {name}: {source}")]
    Video {
        /// Its path, or what it is.
        name: String,
        /// Why.
        source: VideoError,
    },
    /// The checkpoint cannot take such media.
    #[error("the row has {kind}s, but the checkpoint has no `{file}`")]
    NoMediaProcessor {
        /// `image` or `video`.
        kind: &'static str,
        /// The file that would say how to process them.
        file: &'static str,
    },
    /// The template refused or failed.
    #[error("chat template: {0}")]
    Template(TemplateError),
    /// The template rendered fewer assistant turns than the row has.
    #[error(
        "the rendered text has {found} assistant turns (`<|im_start|>assistant`), the row has {expected}; labels cannot be placed with this chat template"
    )]
    AssistantTurns {
        /// Turns in the rendered text.
        found: usize,
        /// Assistant messages.
        expected: usize,
    },
    /// Nothing to learn from.
    #[error("no supervised token: {reason}")]
    NothingSupervised {
        /// Why.
        reason: &'static str,
    },
    /// More tokens than allowed.
    #[error(
        "{tokens} tokens, more than the {limit} allowed; raise the limit, shorten the row, or allow truncation"
    )]
    TooLong {
        /// Tokens of the row.
        tokens: usize,
        /// The limit.
        limit: usize,
    },
    /// The tokenizers library failed.
    #[error("cannot be tokenized: {detail}")]
    Tokenize {
        /// The library's words.
        detail: String,
    },
}

/// A chat template's failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template called `raise_exception`.
    #[error("{message}")]
    Refused {
        /// The template's words.
        message: String,
    },
    /// The checkpoint has none.
    #[error(
        "the checkpoint has no chat template (`chat_template.jinja`, or `chat_template` in tokenizer_config.json)"
    )]
    Absent,
    /// Too much work or output.
    #[error(
        "stopped at line {line}: the template needs more than {limit}; is it meant for this row?"
    )]
    Limit {
        /// The template's line.
        line: usize,
        /// The limit reached.
        limit: String,
    },
    /// It does not parse, or an operation failed.
    #[error("line {line}: {detail}")]
    Failed {
        /// The template's line.
        line: usize,
        /// The engine's words.
        detail: String,
    },
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No such file.
    #[error("no such file")]
    Missing,
    /// A folder, a device, a pipe.
    #[error("not a regular file")]
    NotAFile,
    /// A remote address.
    #[error("is a web address; download it and give the path")]
    Remote,
    /// The operating system refused.
    #[error("cannot be read: {0}")]
    Read(std::io::Error),
    /// A data address or base64 text that does not decode.
    #[error("is not valid base64 data")]
    Base64,
    /// Not one of the known formats.
    #[error("not a JPEG, PNG, WebP, GIF or BMP file")]
    UnknownFormat,
    /// The header promises too much.
    #[error("is {width} x {height} pixels; at most {limit} pixels are decoded")]
    TooLarge {
        /// Pixels a row.
        width: u64,
        /// Rows.
        height: u64,
        /// The cap on their product.
        limit: u64,
    },
    /// The file is cut short.
    #[error("the {format} data is cut short")]
    Truncated {
        /// The format.
        format: &'static str,
    },
    /// The decoder refused.
    #[error("cannot be decoded as {format}: {detail}")]
    Decode {
        /// The format.
        format: &'static str,
        /// The decoder's words.
        detail: String,
    },
    /// One side is far longer than the other.
    #[error("absolute aspect ratio must be smaller than 200, got {ratio} ({height} x {width})")]
    AspectRatio {
        /// Longer over shorter side.
        ratio: f64,
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// No pixels at all.
    #[error("has no pixels ({height} x {width})")]
    Empty {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
}

/// Why a video cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VideoError {
    /// No such file or folder.
    #[error("no such file or folder")]
    Missing,
    /// A remote address.
    #[error("is a web address; download it and give the path")]
    Remote,
    /// A folder without pictures.
    #[error("the folder holds no frames (png, jpg, jpeg, webp, bmp, gif)")]
    NoFrames,
    /// The operating system refused.
    #[error("cannot be read: {0}")]
    Read(std::io::Error),
    /// Fewer frames than a patch has.
    #[error("t:{frames} must be larger than temporal_factor:{temporal_factor}")]
    TooFewFrames {
        /// Frames given.
        frames: usize,
        /// Frames a patch spans.
        temporal_factor: usize,
    },
    /// More frames than are ever used.
    #[error(
        "{frames} frames, at most {limit} are used without sampling; sample them or cut the video"
    )]
    TooManyFrames {
        /// Frames given.
        frames: usize,
        /// The cap.
        limit: usize,
    },
    /// A frame of another size.
    #[error("frame {frame} is {width} x {height}, the first is {first_width} x {first_height}")]
    FrameSize {
        /// The frame, counted from 0.
        frame: usize,
        /// Its width.
        width: usize,
        /// Its height.
        height: usize,
        /// The first frame's width.
        first_width: usize,
        /// The first frame's height.
        first_height: usize,
    },
    /// A frame that cannot be used.
    #[error("frame {frame} ({name}): {source}")]
    Frame {
        /// The frame, counted from 0.
        frame: usize,
        /// Its path.
        name: String,
        /// Why.
        source: ImageError,
    },
    /// Frames that cannot be brought to a usable size.
    #[error("{0}")]
    Size(ImageError),
    /// A rate that is no rate.
    #[error("frames per second must be a positive number, got {fps}")]
    Fps {
        /// The value.
        fps: f64,
    },
    /// Two ways to say how many frames.
    #[error("`num_frames` and `fps` are mutually exclusive arguments, please use only one!")]
    NumFramesAndFps,
    /// A video file without the program that reads it.
    #[error(
        "video files are read by the `ffmpeg` program, which is not installed; install it, or give a folder of frames"
    )]
    NoFfmpeg,
    /// ffmpeg's failure.
    #[error("ffmpeg cannot read it: {detail}")]
    Ffmpeg {
        /// ffmpeg's words.
        detail: String,
    },
}
