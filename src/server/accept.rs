//! Accepts connections and ends them: their number, TLS, the time limits for heads, bodies and responses, and the
//! drain.
//!
//! Knows nothing of what the connections carry. `wire`: a connection's byte stream. `frames`: floods of HTTP/2 frames.
//! `activity`: the open requests of a connection. `held`: the memory kept for it. `body`: the bodies of its requests.
//! `connections`: all connections of a port.

mod activity;
mod body;
mod connections;
mod frames;
mod held;
mod wire;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Version, header};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt as _;

pub(super) use self::activity::Accounted;
use self::activity::Activity;
use self::connections::Connections;
use self::wire::{Socket, Wire};
use super::pace::{Hold, Visits};
use super::tls::Tls;
use crate::metrics::{Ending, IntGauge, Metrics, Port};

/// How long a connection accepted just before shutdown may wait for its first request.
const FIRST_REQUEST: Duration = Duration::from_millis(500);

/// How long an HTTP/1 connection that is idle at shutdown may wait for a request that its client has sent already.
const NEXT_REQUEST: Duration = Duration::from_millis(500);

/// How long an idle connection stays open after its client was told that it ends: time to read that.
const LAST_MOMENTS: Duration = Duration::from_secs(1);

/// Least bytes per second at which a body must arrive or a response must be read, once the time limits are used up.
const LEAST_RATE: u64 = 1024;

/// Most bytes of a request line and headers. hyper may exceed it for HTTP/1, so the routes check again.
pub(super) const HEAD_LIMIT: usize = 64 * 1024;
/// Most bytes of an HTTP/2 head that are read at all: h2 refuses larger ones, without a response body.
const HEAD_LIMIT_HTTP2: u32 = 4 * HEAD_LIMIT as u32;
/// Most headers of a request.
const HEADERS: usize = 128;
/// Concurrent requests of one HTTP/2 connection.
const STREAMS: u32 = 100;
/// Flow-control window of an HTTP/2 connection and of each stream, in bytes. h2 buffers no more than that of unread
/// bodies.
const WINDOW: u32 = 512 * 1024;
/// How long a new connection on a full port waits for one that has been quiet long enough. After that, the connection
/// without a request in work that has been quiet the longest is evicted.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long a connection must have been quiet before a full port evicts it: this, times the connections that the port
/// may have, so that a port replaces 1000 silent connections per second at any limit.
const QUIET: Duration = Duration::from_millis(1);
/// Bounds of that product.
const QUIET_BOUNDS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long a cut connection may need to end, before the port checks whether to cut another.
const GONE: Duration = Duration::from_millis(5);
/// How often a full port looks again for a connection to evict.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// At most how often the log says that file descriptors have run out.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// Limits on a port's connections.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// The port's label in the metrics.
    pub(super) port: Port,
    /// Most open connections. At the limit, the connection that has been quiet the longest is evicted; if none can be,
    /// the new one waits.
    pub(super) connections: usize,
    /// Longest a client may take to send a request's head, from the connection's start or the last response, and to
    /// send a body, beyond the time that its bytes need at the least rate.
    pub(super) head_timeout: Duration,
    /// Longest a response may wait without its client reading any of it, or beyond the time that its bytes need at the
    /// least rate.
    pub(super) write_timeout: Duration,
    /// Longest a request may be in progress.
    pub(super) longest_work: Duration,
    /// Whether a request is a stream, whose client may pause between messages.
    pub(super) is_stream: fn(&Request<Incoming>) -> bool,
    /// `None`: plain TCP.
    pub(super) tls: Option<Arc<Tls>>,
}

/// The connections still open after accepting ended.
pub(super) struct Open {
    stopping: watch::Sender<bool>,
    tasks: JoinSet<()>,
    /// Cuts connections that keep too much memory; stops when this is dropped.
    _relief: JoinSet<()>,
}

impl Open {
    /// Lets every request in flight finish and closes idle connections.
    pub(super) async fn finish(&mut self) {
        self.stopping.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }

    /// Cuts the remaining connections; returns their number.
    pub(super) async fn cut(mut self) -> usize {
        let left = self.tasks.len();
        self.tasks.shutdown().await;
        left
    }
}

/// Accepts connections until `stop` resolves; returns those still open.
pub(super) async fn accept(
    listener: TcpListener,
    routes: Router,
    limits: Limits,
    metrics: Arc<Metrics>,
    mut stop: oneshot::Receiver<()>,
) -> Open {
    let room = Arc::new(Semaphore::new(limits.connections.max(1)));
    let connections = Arc::new(Connections::default());
    let held = Arc::new(held::Port::new(limits.connections));
    let (stopping, stopped) = watch::channel(false);
    let mut relief = JoinSet::new();
    relief.spawn(relieve(held.clone(), connections.clone()));
    let mut open = Open { stopping, tasks: JoinSet::new(), _relief: relief };
    let serve = |stream, permit: Option<OwnedSemaphorePermit>| {
        let activity = Arc::new(Activity::new(held.clone()));
        let registered = connections.join(activity.clone());
        let counted = (limits.port != Port::Admin).then(|| Counted::new(&metrics.connections));
        let connection = connect(stream, routes.clone(), limits.clone(), activity.clone(), stopped.clone());
        let (metrics, port) = (metrics.clone(), limits.port);
        async move {
            let _until_the_end = (permit, counted, registered);
            connection.await;
            if let Some(ending) = activity.ending() {
                metrics.ended(port, ending);
            }
        }
    };
    let mut failures = Failures { last_said: None, since: 0 };
    loop {
        let accepted = tokio::select! {
            biased;
            _ = &mut stop => break,
            accepted = listener.accept() => accepted,
            // finished tasks would pile up
            Some(_) = open.tasks.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let permit = tokio::select! {
                    biased;
                    // the client is connected: serve it, as those in the kernel's queue are served below
                    _ = &mut stop => {
                        open.tasks.spawn(serve(stream, None));
                        break;
                    }
                    permit = make_room(&room, &connections, &limits) => permit,
                };
                open.tasks.spawn(serve(stream, permit));
            }
            Err(error) => {
                // usually no file descriptor is left: evicting a connection frees one
                metrics.ended(limits.port, Ending::Refused);
                failures.say(limits.port, &error);
                connections.evict(quiet(&limits), limits.longest_work);
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }
    // clients in the kernel's queue are connected: closing the listener would reset them
    for stream in queued(listener) {
        open.tasks.spawn(serve(stream, None));
    }
    open
}

fn quiet(limits: &Limits) -> Duration {
    let connections = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    (QUIET * connections.min(10_000)).clamp(QUIET_BOUNDS.0, QUIET_BOUNDS.1)
}

/// A permit for one more connection: a free one, that of an evicted connection, or that of the next that ends.
async fn make_room(room: &Arc<Semaphore>, connections: &Connections, limits: &Limits) -> Option<OwnedSemaphorePermit> {
    let (mut asked, came) = (false, Instant::now());
    loop {
        if let Ok(permit) = room.clone().try_acquire_owned() {
            return Some(permit);
        }
        let least = if came.elapsed() < PATIENCE { quiet(limits) } else { Duration::ZERO };
        asked = asked || connections.evict(least, limits.longest_work);
        let wait = if asked { LAST_MOMENTS } else { LOOK_AGAIN };
        match tokio::time::timeout(wait, room.clone().acquire_owned()).await {
            Ok(permit) => return permit.ok(),
            Err(_) => asked = false,
        }
    }
}

/// Cuts connections whenever the port keeps more memory than its limit.
async fn relieve(held: Arc<held::Port>, connections: Arc<Connections>) {
    loop {
        held.above().await;
        connections.cut_heaviest(held.limit());
        tokio::time::sleep(GONE).await;
    }
}

/// Counts connections that could not be accepted, and logs them now and then.
struct Failures {
    last_said: Option<Instant>,
    since: u64,
}

impl Failures {
    fn say(&mut self, port: Port, error: &std::io::Error) {
        self.since += 1;
        if self.last_said.is_none_or(|said| said.elapsed() > SAY_AGAIN) {
            let (port, failures) = (port.name(), self.since);
            tracing::warn!(port, failures, %error, "connections could not be accepted: {error}");
            *self = Self { last_said: Some(Instant::now()), since: 0 };
        }
    }
}

/// Closes the listener; returns the connections that wait in the kernel's queue.
fn queued(listener: TcpListener) -> Vec<TcpStream> {
    // accept without the runtime, which may not know of the latest connections yet
    let Ok(listener) = listener.into_std() else { return Vec::new() };
    let mut streams = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        streams.extend(stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)));
    }
    streams
}

/// Serves a connection to its end: the TLS handshake, if any, and its requests.
async fn connect(
    stream: TcpStream,
    routes: Router,
    limits: Limits,
    activity: Arc<Activity>,
    stopped: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let Some(tls) = &limits.tls else { return serve(stream, routes, &limits, activity, stopped).await };
    let shaken = tokio::select! {
        shaken = tls.acceptor().accept(stream) => shaken,
        () = tokio::time::sleep(limits.head_timeout) => return activity.end_for(Ending::HeadTimeout),
        () = activity.evicted() => return activity.end_for(Ending::Full),
        () = activity.is_cut() => return activity.end_for(Ending::Memory),
    };
    match shaken {
        Ok(stream) => serve(stream, routes, &limits, activity, stopped).await,
        Err(error) => {
            activity.end_for(Ending::Handshake);
            tracing::debug!(%error, "a TLS handshake failed");
        }
    }
}

async fn serve<S>(
    stream: S,
    routes: Router,
    limits: &Limits,
    activity: Arc<Activity>,
    mut stopped: watch::Receiver<bool>,
) where
    S: Socket + Send + 'static,
{
    let mut builder = Builder::new(TokioExecutor::new());
    let mut http1 = builder.http1();
    http1
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(HEAD_LIMIT)
        .max_headers(HEADERS);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(limits.head_timeout);
    http2.max_header_list_size(HEAD_LIMIT_HTTP2).max_concurrent_streams(STREAMS);
    http2.initial_connection_window_size(WINDOW).initial_stream_window_size(WINDOW);
    let (first, mut seen) = watch::channel(false);
    let wire = Wire::new(stream, activity.clone(), limits.write_timeout);
    let (under_way, limits_of_bodies) = (activity.clone(), limits.clone());
    let (visits, stopping) = (Visits::default(), stopped.clone());
    let service = tower::service_fn(move |mut request: Request<Incoming>| {
        first.send_replace(true);
        request.extensions_mut().insert(visits.clone());
        let mark = under_way.request(&request);
        let http1 = request.version() <= Version::HTTP_11;
        let (request, unread) = body::watch(request, &under_way, &limits_of_bodies);
        let answer = routes.clone().oneshot(request);
        let mut stopping = stopping.clone();
        async move {
            let mut response = answer.await?;
            if let Some(unread) = unread {
                unread.discard().await;
            }
            let stops = match response.extensions_mut().remove::<Hold>() {
                None => *stopping.borrow(),
                Some(hold) => {
                    let stopped = stopping.wait_for(|stopping| *stopping);
                    tokio::time::timeout_at(hold.until.into(), stopped).await.is_ok()
                }
            };
            if http1 && stops {
                // the connection ends: the client must not send another request on it
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(mark.answer(response))
        }
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(wire), TowerToHyperService::new(service)));
    let last_call = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
        // hyper, told to shut down before the first request, would drop that request unread
        let _ = tokio::time::timeout(FIRST_REQUEST, seen.wait_for(|seen| *seen)).await;
        // it would also drop an HTTP/1 request that is on its way; over HTTP/2, GOAWAY names the last request read
        if !activity.speaks_http2() {
            activity.idle(NEXT_REQUEST).await;
        }
    };
    let mut stuck = pin!(activity.stuck(limits.write_timeout));
    let told_to_end = tokio::select! {
        ended = connection.as_mut() => return note(&activity, ended),
        () = stuck.as_mut() => return activity.end_for(Ending::WriteTimeout),
        () = activity.is_cut() => return activity.end_for(Ending::Memory),
        () = last_call => None,
        ending = activity.overstays(limits.head_timeout) => Some(ending),
        () = activity.evicted() => Some(Ending::Full),
    };
    if let Some(ending) = told_to_end {
        activity.end_for(ending);
        if !activity.can_be_told() {
            return;
        }
    }
    connection.as_mut().graceful_shutdown();
    let last_moments = async {
        match told_to_end {
            Some(Ending::Full) => tokio::time::sleep(LAST_MOMENTS).await,
            _ => activity.idle(LAST_MOMENTS).await,
        }
    };
    tokio::select! {
        ended = connection => note(&activity, ended),
        () = stuck => activity.end_for(Ending::WriteTimeout),
        () = activity.is_cut() => activity.end_for(Ending::Memory),
        () = last_moments => {}
    }
}

/// Records why hyper ended a connection, if it did.
fn note(activity: &Activity, ended: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    let Err(error) = ended else { return };
    tracing::debug!(error, "a connection ended early");
    match error.downcast_ref::<hyper::Error>() {
        Some(error) if error.is_timeout() => activity.end_for(activity.out_of_time()),
        Some(error) if error.is_parse() => activity.end_for(Ending::Unreadable),
        Some(error) if broke_the_rules(error) => activity.end_for(Ending::Protocol),
        _ => {}
    }
}

/// Whether the server ended an HTTP/2 connection for a protocol error.
fn broke_the_rules(error: &hyper::Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| cause.is_go_away() && cause.is_library())
}

/// Guard: counts an open connection in the metrics.
struct Counted(IntGauge);

impl Counted {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
