//! Sends requests: over a pool of HTTP/1.1 connections, from which each request takes an idle one or opens a new one,
//! so that no request waits for another's response; or over one gRPC connection, which requests share.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{HeaderMap, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::answer::{Answer, Outcome};
use super::grpc::Grpc;
use super::request::{Payload, Request as Wanted};

type Connection = SendRequest<Full<Bytes>>;

/// Response to a request outside the measurement.
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: Bytes,
}

/// Client of one server, by the protocol of its requests.
#[derive(Debug)]
pub enum Client {
    /// HTTP/1.1.
    Http(Pool),
    /// gRPC.
    Grpc(Grpc),
}

impl Client {
    /// Creates the client for requests such as `wanted`. `server` is `HOST:PORT`.
    pub fn new(server: &str, wanted: &Wanted) -> Result<Self, String> {
        match wanted {
            Wanted::Http(_) => Ok(Self::Http(Pool::new(server.into()))),
            Wanted::Grpc(_) => Grpc::new(server).map(Self::Grpc),
        }
    }

    /// Sends one request and reads the whole response.
    pub async fn send(&self, wanted: &Wanted, timeout: Duration) -> Answer {
        match (self, wanted) {
            (Self::Http(pool), Wanted::Http(payload)) => pool.send(payload, timeout).await,
            (Self::Grpc(grpc), Wanted::Grpc(request)) => grpc.send(request, timeout).await,
            _ => Answer::without(Outcome::Transport),
        }
    }
}

/// Pool of connections to one server.
#[derive(Debug)]
pub struct Pool {
    server: String,
    idle: Mutex<Vec<Connection>>,
}

impl Pool {
    /// An empty pool. `server` is `HOST:PORT`.
    pub fn new(server: String) -> Self {
        Self { server, idle: Mutex::new(Vec::new()) }
    }

    /// Sends one request and reads the whole response.
    pub async fn send(&self, payload: &Payload, timeout: Duration) -> Answer {
        match tokio::time::timeout(timeout, self.exchange("POST", payload)).await {
            Err(_) => Answer::without(Outcome::Timeout),
            Ok(Err(_)) => Answer::without(Outcome::Transport),
            Ok(Ok((status, headers, _))) => {
                Answer { outcome: Outcome::of_http(status), phases: server_timing(&headers) }
            }
        }
    }

    /// Sends one request outside the measurement, such as one for metadata.
    pub async fn ask(&self, method: &str, payload: &Payload) -> Result<Reply, String> {
        let (status, _, body) = self.exchange(method, payload).await?;
        Ok(Reply { status, body })
    }

    async fn exchange(&self, method: &str, payload: &Payload) -> Result<(u16, HeaderMap, Bytes), String> {
        let said = |e: &dyn std::fmt::Display| e.to_string();
        let mut connection = self.connection().await.map_err(|e| said(&e))?;
        let mut request = Request::builder().method(method).uri(&payload.target).header("host", &self.server);
        for (name, value) in &payload.headers {
            request = request.header(*name, value);
        }
        let request = request.body(Full::new(payload.body.clone())).map_err(|e| said(&e))?;
        let answer = connection.send_request(request).await.map_err(|e| said(&e))?;
        let (head, body) = answer.into_parts();
        let body = body.collect().await.map_err(|e| said(&e))?.to_bytes();
        self.idle().push(connection);
        Ok((head.status.as_u16(), head.headers, body))
    }

    async fn connection(&self) -> std::io::Result<Connection> {
        loop {
            let Some(mut idle) = self.idle().pop() else { break };
            if idle.ready().await.is_ok() {
                return Ok(idle);
            }
        }
        let stream = TcpStream::connect(&self.server).await?;
        stream.set_nodelay(true)?;
        let (connection, driver) = handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
        tokio::spawn(driver);
        Ok(connection)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Parses `decode;dur=1.2, queue;dur=0.3` (Server Timing, W3C).
fn server_timing(headers: &HeaderMap) -> Vec<(String, f64)> {
    let Some(text) = headers.get("server-timing").and_then(|v| v.to_str().ok()) else { return Vec::new() };
    let phase = |entry: &str| {
        let mut parts = entry.split(';').map(str::trim);
        let name = parts.next().filter(|n| !n.is_empty())?;
        let ms = parts.find_map(|p| p.strip_prefix("dur="))?.parse().ok()?;
        Some((name.to_string(), ms))
    };
    text.split(',').filter_map(phase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_timing_is_read() {
        let mut headers = HeaderMap::new();
        headers.insert("server-timing", "decode;dur=1.5, queue;desc=\"x\";dur=0.25, miss".parse().expect("valid"));
        assert_eq!(server_timing(&headers), [("decode".to_string(), 1.5), ("queue".to_string(), 0.25)]);
        assert!(server_timing(&HeaderMap::new()).is_empty());
    }
}
