//! Requests to the hub. Follows redirects by itself, so that the token goes to the hub's own host only; maps statuses
//! and `X-Error-Code` to errors; retries temporary failures.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ureq::Agent;
use ureq::http::header::{CONTENT_TYPE, ETAG, LOCATION, RETRY_AFTER};
use ureq::http::uri::{PathAndQuery, Uri};
use ureq::http::{HeaderMap, HeaderName, Method, Request, Response};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use super::id::{HubId, is_commit};
use super::{HubError, HubOptions, Patience, Token};
use crate::printable::brief;

/// Most redirects of one request.
const REDIRECTS: usize = 8;
const COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
const ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");

/// Metadata of a file on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// Name in the cache: the SHA-256 of an LFS file, git's digest of any other.
    pub etag: String,
    /// Size in bytes.
    pub size: u64,
    /// The commit of the revision.
    pub commit: String,
}

/// A client for one model.
#[derive(Debug)]
pub struct Client {
    agent: Agent,
    id: HubId,
    endpoint: Uri,
    /// The endpoint as the user gave it.
    pub endpoint_text: String,
    token: Option<Token>,
    has_authorities: bool,
    /// Timeouts and retries.
    pub patience: Patience,
}

impl Client {
    /// Prepares a client, without any request.
    pub fn new(id: &HubId, options: &HubOptions) -> Result<Self, HubError> {
        let bad = || HubError::BadEndpoint(options.endpoint.clone());
        let endpoint: Uri = options.endpoint.parse().map_err(|_| bad())?;
        if !matches!(endpoint.scheme_str(), Some("http" | "https")) || endpoint.host().is_none_or(str::is_empty) {
            return Err(bad());
        }
        let authorities = rustls_native_certs::load_native_certs().certs;
        let has_authorities = !authorities.is_empty();
        let roots: Vec<_> = authorities.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let p = options.patience;
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("nfold/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(p.connect))
            .timeout_connect(Some(p.connect))
            .timeout_recv_response(Some(p.read))
            .timeout_recv_body(Some(p.response))
            .timeout_per_read(Some(p.read))
            .build();
        Ok(Self {
            agent: config.new_agent(),
            id: id.clone(),
            endpoint,
            endpoint_text: options.endpoint.clone(),
            token: options.token.clone(),
            has_authorities,
            patience: p,
        })
    }

    /// Metadata of a file at a revision; `None` if the revision has no such file.
    pub fn look(&self, revision: &str, file: &str) -> Result<Option<Remote>, HubError> {
        let mut fruitless = 0;
        loop {
            match self.look_once(revision, file) {
                Err(error) if error.is_passing() => {
                    // an unreachable hub stays so for a while, and the cache may have the file
                    let gone = matches!(error, HubError::Unreachable { .. });
                    let tries = if gone { self.patience.tries.min(2) } else { self.patience.tries };
                    self.pause(&mut fruitless, tries, error)?;
                }
                other => return other,
            }
        }
    }

    fn look_once(&self, revision: &str, file: &str) -> Result<Option<Remote>, HubError> {
        let mut said = HeaderMap::new();
        let reply = self.ask(&Method::HEAD, revision, file, None, &mut |headers| {
            for name in [COMMIT, LINKED_ETAG, LINKED_SIZE] {
                if let (Some(value), false) = (headers.get(&name), said.contains_key(&name)) {
                    said.insert(name, value.clone());
                }
            }
            // only the hub's own ETag counts; that of a redirect's target means something else
            if headers.contains_key(COMMIT)
                && let (Some(value), false) = (headers.get(ETAG), said.contains_key(ETAG))
            {
                said.insert(ETAG, value.clone());
            }
            said.contains_key(COMMIT) && said.contains_key(LINKED_ETAG) && said.contains_key(LINKED_SIZE)
        })?;
        let host = reply.host.clone();
        let no_hub = |what: &str| HubError::NoHub { endpoint: host.clone(), file: file.into(), what: what.into() };
        if !reply.response.status().is_redirection()
            && let Some(error) = self.refusal(&reply, revision, file)
        {
            return match error {
                HubError::NoCheckpoint { .. } => Ok(None),
                // for hubs that give no reasons: the commit is known, so only the file is missing
                HubError::NotFound { .. } if is_commit(revision) && reply.response.status() == 404 => Ok(None),
                error => Err(error),
            };
        }
        let text = |name: &HeaderName| said.get(name).and_then(|v| v.to_str().ok());
        let page = is_page(reply.response.headers());
        let commit = text(&COMMIT).ok_or_else(|| no_hub(if page { "a web page" } else { "no X-Repo-Commit" }))?;
        let etag = text(&LINKED_ETAG).or(text(&ETAG)).ok_or_else(|| no_hub("no ETag"))?;
        let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
        let size = match text(&LINKED_SIZE) {
            Some(size) => size.parse().ok(),
            None => {
                let length = reply.response.headers().get(ureq::http::header::CONTENT_LENGTH);
                length.and_then(|v| v.to_str().ok()?.parse().ok()).filter(|_| reply.response.status() == 200)
            }
        };
        if !is_commit(commit) {
            return Err(no_hub("an X-Repo-Commit that is no commit"));
        }
        if !is_file_name(etag) {
            return Err(no_hub("an ETag that can't name a file"));
        }
        let size = size.ok_or_else(|| no_hub("no size"))?;
        Ok(Some(Remote { etag: etag.into(), size, commit: commit.into() }))
    }

    /// Requests a file's content from byte `from` on. The response's status is 200 (from byte 0), 206 or 416.
    pub fn content(&self, commit: &str, file: &str, from: u64) -> Result<Reply, HubError> {
        let range = (from > 0).then(|| format!("bytes={from}-"));
        let reply = self.ask(&Method::GET, commit, file, range.as_deref(), &mut |_| false)?;
        if reply.response.status() == 416 {
            return Ok(reply);
        }
        if let Some(error) = self.refusal(&reply, commit, file) {
            return Err(error);
        }
        if is_page(reply.response.headers()) {
            return Err(HubError::NoHub { endpoint: reply.host, file: file.into(), what: "a web page".into() });
        }
        Ok(reply)
    }

    /// Waits before the next of `tries` attempts in a row; returns the error after the last.
    pub fn pause(&self, fruitless: &mut u32, tries: u32, error: HubError) -> Result<(), HubError> {
        *fruitless += 1;
        let p = &self.patience;
        if *fruitless >= tries {
            return Err(match error {
                HubError::Busy { endpoint, status, file, seconds, .. } => {
                    HubError::Busy { endpoint, status, file, seconds, after: format!(" after {fruitless} tries") }
                }
                other => other,
            });
        }
        let own = p.pause * 2u32.pow((*fruitless - 1).min(10));
        let asked = match error {
            HubError::Busy { seconds: Some(seconds), .. } => Duration::from_secs(seconds),
            _ => Duration::ZERO,
        };
        thread::sleep(own.max(asked).min(p.longest_pause));
        Ok(())
    }

    /// Follows redirects to a response that is none, or until `enough` returns true for a response's headers.
    fn ask(
        &self,
        method: &Method,
        revision: &str,
        file: &str,
        range: Option<&str>,
        enough: &mut dyn FnMut(&HeaderMap) -> bool,
    ) -> Result<Reply, HubError> {
        // a revision may contain slashes
        let path = format!("/{}/resolve/{}/{file}", self.id.repository(), revision.replace('/', "%2F"));
        let bad = || HubError::BadEndpoint(self.endpoint_text.clone());
        let mut url: Uri = format!("{}{path}", self.endpoint_text).parse().map_err(|_| bad())?;
        for _ in 0..=REDIRECTS {
            let host = shown(&url);
            let response = self.send(method, &url, range).map_err(|reason| match reason {
                Trouble::NoAuthorities => HubError::NoAuthorities(host.clone()),
                Trouble::Transport(reason) => HubError::Unreachable { endpoint: host.clone(), reason },
            })?;
            let status = response.status();
            let done = enough(response.headers());
            let location = response.headers().get(LOCATION).filter(|_| status.is_redirection() && status != 304);
            let Some(location) = location.filter(|_| !done) else {
                return Ok(Reply { host, response });
            };
            let redirect = |what: String| HubError::Redirect { endpoint: host.clone(), file: file.into(), what };
            let target = location.to_str().unwrap_or_default();
            let next = absolute(&url, target).ok_or_else(|| redirect("to no address".into()))?;
            if url.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(redirect(format!("to {}, which is not encrypted", shown(&next))));
            }
            url = next;
        }
        Err(HubError::Redirect {
            endpoint: shown(&url),
            file: file.into(),
            what: format!("more than {REDIRECTS} times"),
        })
    }

    fn send(&self, method: &Method, url: &Uri, range: Option<&str>) -> Result<Response<ureq::Body>, Trouble> {
        if url.scheme_str() == Some("https") && !self.has_authorities {
            return Err(Trouble::NoAuthorities);
        }
        let mut request = Request::builder().method(method).uri(url);
        if let (Some(token), true) = (&self.token, self.is_own(url)) {
            request = request.header("authorization", token.bearer());
        }
        if let Some(range) = range {
            request = request.header("range", range);
        }
        let request = request.body(()).map_err(|_| Trouble::Transport("HF_TOKEN can't be sent in a header".into()))?;
        self.agent.run(request).map_err(|e| Trouble::Transport(reason(&e)))
    }

    /// Whether a URL is on the hub's own host: the token is sent to no other.
    fn is_own(&self, url: &Uri) -> bool {
        let of = |url: &Uri| (url.scheme_str().map(String::from), url.host().map(str::to_ascii_lowercase), port(url));
        of(url) == of(&self.endpoint)
    }

    /// The error of a response without content, by its status.
    fn refusal(&self, reply: &Reply, revision: &str, file: &str) -> Option<HubError> {
        let (status, headers) = (reply.response.status().as_u16(), reply.response.headers());
        if matches!(status, 200 | 206) {
            return None;
        }
        let header = |name| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let (id, endpoint) = (self.id.repository(), self.endpoint_text.clone());
        let (host, file) = (reply.host.clone(), file.to_string());
        // `X-Error-Code` of a redirect's target means something else
        let code = if host == shown(&self.endpoint) { header(ERROR_CODE) } else { "elsewhere" };
        Some(match (status, code) {
            (404, "EntryNotFound") => HubError::NoCheckpoint { id, what: file },
            (404, "RevisionNotFound") => HubError::NoRevision { id, revision: revision.into(), endpoint },
            (401 | 403, "GatedRepo") => HubError::Gated { id, endpoint },
            (_, "RepoNotFound") | (401, "") | (404, "") => HubError::NotFound { id, endpoint },
            (403, "") => HubError::Forbidden { id, endpoint },
            (408 | 429 | 500..=599, _) => {
                let seconds = header(RETRY_AFTER).trim().parse().ok();
                HubError::Busy { endpoint: host, status, file, after: String::new(), seconds }
            }
            _ => {
                let message = header(ERROR_MESSAGE);
                let message = if message.is_empty() { String::new() } else { format!(": {}", brief(message)) };
                HubError::Status { endpoint: host, status, file, message }
            }
        })
    }
}

/// A response, and the host that sent it.
#[derive(Debug)]
pub struct Reply {
    /// Scheme and host.
    pub host: String,
    /// The response.
    pub response: Response<ureq::Body>,
}

enum Trouble {
    NoAuthorities,
    Transport(String),
}

fn reason(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(e) => brief(e),
        ureq::Error::Timeout(_) => "no answer in time".into(),
        ureq::Error::HostNotFound => "no such host".into(),
        ureq::Error::Rustls(e) => format!("{}; a company's own authority goes into SSL_CERT_FILE", brief(e)),
        other => brief(other),
    }
}

fn is_page(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"))
}

fn port(url: &Uri) -> u16 {
    url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 })
}

/// A URL without parts that may be secret.
fn shown(url: &Uri) -> String {
    let host = url.host().unwrap_or_default();
    let port = url.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{host}{port}", url.scheme_str().unwrap_or_default())
}

/// The target of a redirect: an absolute URL, or a path on the same host.
fn absolute(from: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with("//") {
        return format!("{}:{location}", from.scheme_str()?).parse().ok();
    }
    if location.starts_with('/') {
        let mut parts = from.clone().into_parts();
        parts.path_and_query = Some(location.parse::<PathAndQuery>().ok()?);
        return Uri::from_parts(parts).ok();
    }
    let url: Uri = location.parse().ok()?;
    (matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()).then_some(url)
}

/// Whether an ETag can be a file name in the cache.
fn is_file_name(etag: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !etag.is_empty() && etag.len() <= 128 && !etag.starts_with('.') && etag.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_say() {
        let from: Uri = "https://hub.test:444/a/b?c".parse().expect("address");
        let to = |location: &str| absolute(&from, location).map(|url| url.to_string());
        assert_eq!(to("/x?y").as_deref(), Some("https://hub.test:444/x?y"));
        assert_eq!(to("//cdn.test/x").as_deref(), Some("https://cdn.test/x"));
        assert_eq!(to("http://cdn.test/x").as_deref(), Some("http://cdn.test/x"));
        for bad in ["", "x", "ftp://x/y", "file:///etc/passwd", "http://"] {
            assert_eq!(to(bad), None, "{bad}");
        }
        assert_eq!(shown(&"http://user:secret@h:1/p?q".parse().expect("address")), "http://h:1");
    }
}
