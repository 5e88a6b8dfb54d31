//! A Hub in the test itself: an endpoint, and the host of large files that it redirects to.
//!
//! Answers as huggingface.co does, as far as downloads need it, keeps a log of what was asked, and can be told to fail.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use sha2::{Digest, Sha256};

pub(super) const REPOSITORY: &str = "Qwen/tiny-0.1B";
pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The commit of the tag `v1` and of the branch `refs/pr/1`.
pub(super) const OLDER_COMMIT: &str = "fedcba9876543210fedcba9876543210fedcba98";

/// Who was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Host {
    /// HF_ENDPOINT.
    Endpoint,
    /// Where large files are.
    Files,
}

/// What was asked.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) host: Host,
    pub(super) method: String,
    pub(super) path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// As `GET /path`.
    pub(super) fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn is(&self, words: &str) -> bool {
        self.line().contains(words)
    }
}

/// What happens instead of an answer.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// This status, with these lines of the header.
    Status(u16, &'static str),
    /// The right header, so many bytes of the content, and the end of the connection.
    Cut(usize),
    /// The same, but the connection stays open until the other side goes away.
    Stall(usize),
    /// Nothing but the end of the connection.
    HangUp,
    /// The right header with these lines in place of those of the same name.
    Header(&'static str),
    /// Other content of the same length.
    Flipped,
    /// The whole content, whatever range was asked for.
    NoRange,
    /// The right answer, once this many requests with these words have come.
    After(&'static str, usize),
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// A fault for the next request with these words.
    faults: Vec<(&'static str, Fault)>,
    log: Vec<Request>,
    /// Without it nobody is let in.
    token: Option<&'static str>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    asked: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

/// A running Hub with one model.
#[derive(Debug)]
pub(super) struct Hub {
    shared: Arc<Shared>,
    endpoint: String,
}

impl Hub {
    /// A Hub whose one model has the files of a directory.
    pub(super) fn of(dir: &Path) -> Self {
        let shared: Arc<Shared> = Arc::default();
        for entry in fs_err::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let content = fs_err::read(entry.path()).unwrap();
            shared.state().files.insert(name, content);
        }
        let files = listen(Host::Files, &shared, String::new());
        let endpoint = listen(Host::Endpoint, &shared, files);
        Self { shared, endpoint }
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Adds a file to the model, or changes one.
    pub(super) fn put(&self, name: &str, content: impl Into<Vec<u8>>) {
        let mut state = self.shared.state();
        state.files.insert(name.to_owned(), content.into());
    }

    /// From now on only requests with this token are answered by the endpoint.
    pub(super) fn demand(&self, token: &'static str) {
        self.shared.state().token = Some(token);
    }

    /// The next request with these words goes wrong; of several faults for the same words each one counts once.
    pub(super) fn fail(&self, words: &'static str, fault: Fault) {
        self.shared.state().faults.push((words, fault));
    }

    /// What was asked since the last call.
    pub(super) fn log(&self) -> Vec<Request> {
        std::mem::take(&mut self.shared.state().log)
    }

    /// The same in words.
    pub(super) fn lines(&self) -> Vec<String> {
        self.log().iter().map(Request::line).collect()
    }
}

/// A port that nobody answers on.
pub(super) fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// The digest of content, as an ETag has it.
pub(super) fn sha256(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Large files have the digest as their ETag, others the one of git: here 40 digits that tell contents apart.
pub(super) fn etag(name: &str, content: &[u8]) -> String {
    let digest = sha256(content);
    if is_large(name) {
        digest
    } else {
        digest[..40].to_owned()
    }
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name == "tokenizer.json"
}

/// Starts a host and gives its address. It ends with the process.
fn listen(host: Host, shared: &Arc<Shared>, files: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (shared, files) = (Arc::clone(shared), Arc::new(files));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (shared, files) = (Arc::clone(&shared), Arc::clone(&files));
            std::thread::spawn(move || {
                // The other side may go away whenever it wants.
                let _ = serve(host, &stream, &shared, &files);
            });
        }
    });
    address
}

/// Answers one request.
fn serve(host: Host, stream: &TcpStream, shared: &Shared, files: &str) -> std::io::Result<()> {
    let request = read(host, stream)?;
    let fault = {
        let mut state = shared.state();
        state.log.push(request.clone());
        shared.asked.notify_all();
        let found = state.faults.iter().position(|(words, _)| request.is(words));
        found.map(|at| state.faults.remove(at).1)
    };
    if let Some(Fault::After(words, count)) = &fault {
        let state = shared.state();
        let enough = |state: &mut State| {
            let come = state.log.iter().filter(|request| request.is(words));
            come.count() < *count
        };
        drop(shared.asked.wait_while(state, enough).unwrap());
    }
    let mut answer = answer(&request, &shared.state(), files);
    let mut sent = answer.content.len();
    match fault {
        Some(Fault::HangUp) => return Ok(()),
        Some(Fault::Status(status, lines)) => answer = Answer::plain(status).with(lines),
        Some(Fault::Header(lines)) => answer = answer.with(lines),
        Some(Fault::Cut(bytes) | Fault::Stall(bytes)) => sent = bytes,
        Some(Fault::Flipped) => {
            let last = answer.content.len() - 1;
            answer.content[last] ^= 1;
        }
        _ => {}
    }
    let whole = matches!(fault, Some(Fault::NoRange));
    let (start, status) = match request.header("range") {
        Some(range) if answer.status == 200 && !whole => {
            let start = range.trim_start_matches("bytes=").trim_end_matches('-');
            let (start, size) = (start.parse::<usize>().unwrap(), answer.content.len());
            if start >= size {
                answer = Answer::plain(416);
                (0, 416)
            } else {
                let range = format!("Content-Range: bytes {start}-{}/{size}", size - 1);
                answer = answer.with(&range);
                (start, 206)
            }
        }
        _ => (0, answer.status),
    };
    let content = &answer.content[start..];
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 {status} So\r\nContent-Length: {}\r\nConnection: close\r\n",
        content.len()
    )?;
    for (name, value) in &answer.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    write!(stream, "\r\n")?;
    if request.method != "HEAD" {
        stream.write_all(&content[..sent.min(content.len())])?;
    }
    if let Some(Fault::Stall(_)) = fault {
        let _ = stream.read(&mut [0]);
    }
    Ok(())
}

fn read(host: Host, stream: &TcpStream) -> std::io::Result<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_owned);
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    Ok(Request {
        host,
        method: words.next().unwrap_or_default(),
        path: words.next().unwrap_or_default(),
        headers,
    })
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    content: Vec<u8>,
}

impl Answer {
    fn plain(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            content: Vec::new(),
        }
    }

    fn with(mut self, lines: &str) -> Self {
        for line in lines.lines() {
            let (name, value) = line.split_once(": ").unwrap();
            self.headers.retain(|(other, _)| other != name);
            self.headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }
}

/// What a Hub without faults says.
fn answer(request: &Request, state: &State, files: &str) -> Answer {
    let path = request.path.split('?').next().unwrap_or_default();
    if request.host == Host::Files {
        let digest = path.trim_start_matches("/blobs/");
        let found = state
            .files
            .values()
            .find(|content| sha256(content) == digest);
        return match found {
            Some(content) => Answer {
                content: content.clone(),
                ..Answer::plain(200)
            },
            None => Answer::plain(404),
        };
    }
    if let Some(token) = state.token
        && request.header("authorization") != Some(&format!("Bearer {token}"))
    {
        return Answer::plain(401).with("X-Error-Code: RepoNotFound");
    }
    // A model that was renamed.
    if path.contains("Qwen/old-name") {
        let to = path.replace("Qwen/old-name", REPOSITORY);
        return Answer::plain(307).with(&format!("Location: {to}"));
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPOSITORY}/revision/")) {
        let commit = match revision {
            "main" | COMMIT => COMMIT,
            "v1" | "refs%2Fpr%2F1" | OLDER_COMMIT => OLDER_COMMIT,
            _ => return Answer::plain(404).with("X-Error-Code: RevisionNotFound"),
        };
        let siblings: Vec<_> = state
            .files
            .keys()
            .map(|name| serde_json::json!({ "rfilename": name }))
            .collect();
        let listing = serde_json::json!({ "sha": commit, "siblings": siblings });
        return Answer {
            content: listing.to_string().into_bytes(),
            ..Answer::plain(200)
        };
    }
    let file = path
        .strip_prefix(&format!("/{REPOSITORY}/resolve/"))
        .and_then(|rest| rest.split_once('/'))
        .and_then(|(commit, name)| Some((commit, name, state.files.get(name)?)));
    let Some((commit, name, content)) = file else {
        return Answer::plain(404).with("X-Error-Code: RepoNotFound");
    };
    let etag = etag(name, content);
    if is_large(name) {
        let size = content.len();
        return Answer::plain(302).with(&format!(
            "Location: {files}/blobs/{etag}?signature=secret\nX-Repo-Commit: {commit}\nX-Linked-Etag: \"{etag}\"\nX-Linked-Size: {size}\nETag: \"of-the-pointer\""
        ));
    }
    Answer {
        content: content.clone(),
        ..Answer::plain(200)
    }
    .with(&format!("X-Repo-Commit: {commit}\nETag: W/\"{etag}\""))
}
