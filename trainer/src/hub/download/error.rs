//! What can go wrong between here and the Hub.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a request or a download failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum DownloadError {
    #[error("{url} answered {status}{}", details(message.as_deref(), *retry_after))]
    Status {
        /// Without its query, which may hold a signature.
        url: String,
        status: u16,
        /// The Hub's word for it.
        code: Option<String>,
        message: Option<String>,
        retry_after: Option<Duration>,
        /// Whether the endpoint said so, and not a host that it sent us to.
        from_endpoint: bool,
    },
    #[error("{url} cannot be read")]
    Transport {
        url: String,
        #[source]
        source: Box<ureq::Error>,
    },
    #[error("the connection broke at byte {at} of {size} of {file}")]
    Cut {
        file: String,
        at: u64,
        size: u64,
        #[source]
        source: Option<io::Error>,
    },
    #[error("{url} redirects to `{to}`, {reason}")]
    Redirect {
        url: String,
        to: String,
        reason: &'static str,
    },
    #[error("{url} has no usable `{header}` ({}); is HF_ENDPOINT a Hub?", found.as_deref().unwrap_or("none at all"))]
    Header {
        url: String,
        header: &'static str,
        found: Option<String>,
    },
    #[error("{url} is no list of a model's files")]
    Listing {
        url: String,
        #[source]
        source: serde_json::Error,
    },
    #[error(
        "the Hub lists a file `{name}` of {id}, which would lie outside of the snapshot; nothing was downloaded"
    )]
    FileName { id: String, name: String },
    #[error(
        "{file} of {id} would be {found} bytes long, but {size} were announced; what was downloaded of it is removed"
    )]
    Size {
        id: String,
        file: String,
        found: u64,
        size: u64,
    },
    #[error(
        "{file} of {id} has the SHA-256 {found}, but {announced} was announced; what was downloaded of it is removed, try again"
    )]
    Digest {
        id: String,
        file: String,
        found: String,
        announced: String,
    },
    #[error("the download of another file failed")]
    Stopped,
    #[error("could not {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl DownloadError {
    /// Whether the same request may go well a moment later.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            // Addresses that the Hub sends us to are signed for a while; the next request gets a fresh one.
            Self::Status {
                status: 403,
                from_endpoint,
                ..
            } => !from_endpoint,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..),
            Self::Transport { source, .. } => !matches!(
                **source,
                ureq::Error::BadUri(_)
                    | ureq::Error::Http(_)
                    | ureq::Error::Tls(_)
                    | ureq::Error::InvalidProxyUrl
            ),
            Self::Cut { .. } => true,
            _ => false,
        }
    }

    /// Whether there was nobody to talk to, as far as one can tell: no name, no route, no connection.
    pub(super) fn is_unreachable(&self) -> bool {
        let Self::Transport { source, .. } = self else {
            return false;
        };
        match &**source {
            ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => true,
            // Of a connection that was there; the others have no common kind (a name that is not found has none at all).
            ureq::Error::Io(error) => !matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::Interrupted
            ),
            _ => false,
        }
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

fn details(message: Option<&str>, retry_after: Option<Duration>) -> String {
    let mut text = message.map_or_else(String::new, |message| format!(" ({message})"));
    if let Some(wait) = retry_after {
        text += &format!(" and asks to wait for {} s", wait.as_secs());
    }
    text
}

/// Adds to an error of the file system what was tried on which path.
pub(super) fn io(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> DownloadError {
    let path = path.into();
    move |source| DownloadError::Io {
        action,
        path,
        source,
    }
}
