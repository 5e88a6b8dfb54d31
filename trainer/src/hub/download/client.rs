//! Requests to the endpoint, and to the hosts that it sends us to.
//!
//! hf-hub's own client sends the token along to any host that the Hub redirects to, has no time limits, and hides what a
//! refusal says; so requests are made here, with the HTTP library that it uses.

use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use hf_hub::api::RepoInfo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, header};
use ureq::{Agent, Body};

use super::error::DownloadError;
use super::patience::Patience;
use crate::hub::cache::hub_home;
use crate::hub::id::{HubId, is_commit};

/// Where the Hub is, unless HF_ENDPOINT says otherwise.
const ENDPOINT: &str = "https://huggingface.co";

const MAX_REDIRECTS: usize = 10;

/// A list of files is never as large.
const MAX_LISTING_BYTES: u64 = 64 << 20;

/// What stays as it is in a part of an address.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// The Hub.
pub(super) struct Client {
    agent: Agent,
    /// Without a slash at its end.
    endpoint: String,
    home: Origin,
    token: Option<HeaderValue>,
    /// Whether it has answered yet.
    reached: AtomicBool,
}

/// What the Hub says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    /// The name of its blob; for large files the SHA-256 of the content.
    pub(super) etag: String,
    pub(super) size: u64,
}

/// Which redirects are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Follow {
    /// Those that stay at the endpoint: a renamed model.
    Home,
    /// Those to the hosts of large files too.
    Anywhere,
}

/// Scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Origin(String, String, u16);

impl Client {
    /// A client as HF_ENDPOINT, HF_TOKEN and the token's file tell.
    pub(super) fn new(variable: &dyn Fn(&str) -> Option<OsString>) -> anyhow::Result<Self> {
        let endpoint = match variable("HF_ENDPOINT") {
            Some(text) => text
                .into_string()
                .ok()
                .context("HF_ENDPOINT is no address")?,
            None => ENDPOINT.to_owned(),
        };
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        let home = endpoint
            .parse()
            .ok()
            .and_then(|uri| Origin::of(&uri))
            .with_context(|| {
                format!("HF_ENDPOINT is `{endpoint}`, which is no address as {ENDPOINT}")
            })?;
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("trainer/", env!("CARGO_PKG_VERSION")))
            // Compressed answers have no known length, and cannot be resumed.
            .accept_encoding("identity")
            .timeout_resolve(Some(Duration::from_secs(10)))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(Duration::from_secs(30)))
            .build()
            .into();
        Ok(Self {
            agent,
            endpoint,
            home,
            token: token(variable)?,
            reached: AtomicBool::new(false),
        })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// The commit of an id's revision and the names of its files, as the Hub says them.
    pub(super) fn list(&self, id: &HubId) -> Result<RepoInfo, DownloadError> {
        let url = format!("{}/api/{}", self.endpoint, id.repo(id.revision()).api_url());
        let mut answer = self.request(&Method::GET, &url, None, Follow::Home)?;
        let text = answer
            .body_mut()
            .with_config()
            .limit(MAX_LISTING_BYTES)
            .read_to_vec()
            .map_err(|source| transport(&url, source))?;
        let listing: RepoInfo =
            serde_json::from_slice(&text).map_err(|source| DownloadError::Listing {
                url: url.clone(),
                source,
            })?;
        if !is_commit(&listing.sha) {
            return Err(DownloadError::Header {
                url,
                header: "sha",
                found: Some(listing.sha),
            });
        }
        Ok(listing)
    }

    /// What the Hub says of a file at a commit.
    pub(super) fn look_at(
        &self,
        id: &HubId,
        commit: &str,
        name: &str,
    ) -> Result<RemoteFile, DownloadError> {
        let url = self.address(id, commit, name);
        let answer = self.request(&Method::HEAD, &url, None, Follow::Home)?;
        let headers = answer.headers();
        let wrong = |header: &'static str, found: Option<&str>| DownloadError::Header {
            url: url.clone(),
            header,
            found: found.map(str::to_owned),
        };
        let found = text(headers, "x-repo-commit");
        if found != Some(commit) {
            return Err(wrong("X-Repo-Commit", found));
        }
        // Of a large file the plain headers are those of a pointer, or of the answer that redirects.
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
        let size = text(headers, "x-linked-size").or_else(|| text(headers, "content-length"));
        Ok(RemoteFile {
            name: name.to_owned(),
            etag: etag
                .and_then(blob_name)
                .ok_or_else(|| wrong("ETag", etag))?,
            size: size
                .and_then(|size| size.parse().ok())
                .ok_or_else(|| wrong("Content-Length", size))?,
        })
    }

    /// The content of a file at a commit from byte `start` on, and from where on the server sends it.
    pub(super) fn open(
        &self,
        id: &HubId,
        commit: &str,
        file: &RemoteFile,
        start: u64,
    ) -> Result<(u64, Body), DownloadError> {
        let url = self.address(id, commit, &file.name);
        let range = (start > 0).then(|| format!("bytes={start}-"));
        let answer = self.request(&Method::GET, &url, range.as_deref(), Follow::Anywhere)?;
        if answer.status() != 206 {
            // A server that knows no ranges sends everything.
            return Ok((0, answer.into_body()));
        }
        let found = text(answer.headers(), "content-range");
        let expected = format!(
            "bytes {start}-{}/{}",
            file.size.saturating_sub(1),
            file.size
        );
        if found != Some(expected.as_str()) {
            return Err(DownloadError::Header {
                url,
                header: "Content-Range",
                found: found.map(str::to_owned),
            });
        }
        Ok((start, answer.into_body()))
    }

    /// Makes a request again while that may help.
    pub(super) fn patiently<T>(
        &self,
        mut request: impl FnMut() -> Result<T, DownloadError>,
    ) -> Result<T, DownloadError> {
        let mut patience = Patience::new();
        loop {
            match request() {
                Ok(value) => return Ok(value),
                // Whoever is offline should not wait to be told.
                Err(error) if error.is_unreachable() && !self.reached.load(Ordering::Relaxed) => {
                    return Err(error);
                }
                Err(error) => patience.wait(error)?,
            }
        }
    }

    fn address(&self, id: &HubId, commit: &str, name: &str) -> String {
        let name: Vec<String> = name
            .split('/')
            .map(|part| utf8_percent_encode(part, PLAIN).to_string())
            .collect();
        let repo = id.repo(commit);
        format!(
            "{}/{}/resolve/{}/{}",
            self.endpoint,
            repo.url(),
            repo.url_revision(),
            name.join("/")
        )
    }

    fn request(
        &self,
        method: &Method,
        url: &str,
        range: Option<&str>,
        follow: Follow,
    ) -> Result<Response<Body>, DownloadError> {
        let mut uri: Uri = url
            .parse()
            .map_err(|_| transport(url, ureq::Error::BadUri(url.to_owned())))?;
        // The token goes to the endpoint, and not even there once another host has had its say.
        let mut at_home = true;
        for _ in 0..MAX_REDIRECTS {
            let mut request = Request::builder().method(method).uri(&uri);
            if let (true, Some(token)) = (at_home, &self.token) {
                request = request.header(header::AUTHORIZATION, token);
            }
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
            }
            let answer = request
                .body(())
                .map_err(ureq::Error::from)
                .and_then(|request| self.agent.run(request))
                .map_err(|source| transport(&shown(&uri), source))?;
            self.reached.store(true, Ordering::Relaxed);
            if !answer.status().is_redirection() {
                return checked(answer, &uri, at_home);
            }
            let to = self.redirected(&uri, &answer)?;
            at_home &= Origin::of(&to).as_ref() == Some(&self.home);
            if follow == Follow::Home && !at_home {
                return Ok(answer);
            }
            uri = to;
        }
        Err(DownloadError::Redirect {
            url: url.to_owned(),
            to: shown(&uri),
            reason: "and so on without an end",
        })
    }

    fn redirected(&self, from: &Uri, answer: &Response<Body>) -> Result<Uri, DownloadError> {
        let location = text(answer.headers(), "location").unwrap_or_default();
        let refused = |reason| DownloadError::Redirect {
            url: shown(from),
            to: location.split('?').next().unwrap_or_default().to_owned(),
            reason,
        };
        let to = join(from, location).ok_or_else(|| refused("which is no address"))?;
        if self.home.0 == "https" && to.scheme_str() != Some("https") {
            return Err(refused("which is not encrypted"));
        }
        Ok(to)
    }
}

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let scheme = uri.scheme_str()?;
        let usual = match scheme {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = uri.host().filter(|host| !host.is_empty())?;
        let port = uri.port_u16().unwrap_or(usual);
        Some(Self(scheme.to_owned(), host.to_ascii_lowercase(), port))
    }
}

/// HF_TOKEN, or what `hf auth login` has written.
fn token(variable: &dyn Fn(&str) -> Option<OsString>) -> anyhow::Result<Option<HeaderValue>> {
    let (source, token) = match variable("HF_TOKEN") {
        Some(token) => (
            "HF_TOKEN".to_owned(),
            token.into_string().unwrap_or_default(),
        ),
        None => {
            let file = variable("HF_TOKEN_PATH")
                .map(Into::into)
                .or_else(|| Some(hub_home(variable)?.join("token")));
            let Some(file) = file.filter(|file| file.is_file()) else {
                return Ok(None);
            };
            let token = fs_err::read_to_string(&file)?;
            (file.display().to_string(), token)
        }
    };
    let token = token.trim();
    if token.is_empty() {
        return Ok(None);
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .ok()
        .filter(|_| token.chars().all(|c| c.is_ascii_graphic()))
        .with_context(|| {
            format!("{source} holds no token: a token is one word of plain letters")
        })?;
    // Kept out of logs.
    value.set_sensitive(true);
    Ok(Some(value))
}

/// The name of a blob by its ETag: quotes and the mark of weak ones go, and it must be a plain file name.
fn blob_name(etag: &str) -> Option<String> {
    let name = etag.trim_start_matches("W/").trim_matches('"');
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let valid = !name.is_empty() && name.len() <= 128 && name.chars().all(plain);
    valid.then(|| name.to_owned())
}

/// What an address redirects to.
fn join(from: &Uri, location: &str) -> Option<Uri> {
    let scheme = from.scheme_str()?;
    let text = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{}{location}", from.authority()?)
    } else {
        location.to_owned()
    };
    let uri: Uri = text.parse().ok()?;
    Origin::of(&uri)?;
    Some(uri)
}

/// An answer that is what was asked for, or the error that it says.
fn checked(
    answer: Response<Body>,
    uri: &Uri,
    from_endpoint: bool,
) -> Result<Response<Body>, DownloadError> {
    if answer.status().is_success() {
        return Ok(answer);
    }
    let headers = answer.headers();
    let owned = |name| text(headers, name).map(str::to_owned);
    Err(DownloadError::Status {
        url: shown(uri),
        status: answer.status().as_u16(),
        code: owned("x-error-code"),
        message: owned("x-error-message"),
        retry_after: text(headers, "retry-after")
            .and_then(|seconds| seconds.parse().ok())
            .map(Duration::from_secs),
        from_endpoint,
    })
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// An address without its query.
fn shown(uri: &Uri) -> String {
    let (scheme, host) = (uri.scheme_str().unwrap_or_default(), uri.authority());
    let host = host.map_or("", |host| host.as_str());
    // A name and password before the host are nobody's business.
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{}", uri.path())
}

fn transport(url: &str, source: ureq::Error) -> DownloadError {
    DownloadError::Transport {
        url: url.to_owned(),
        source: Box::new(source),
    }
}
