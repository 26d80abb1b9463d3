//! Accepts connections and ends them: their number, TLS, the time limits for heads, bodies and answers, and the drain.
//!
//! Knows nothing of what the connections carry. `wire`: a connection's bytes. `frames`: HTTP/2 frames that ask for nothing.
//! `activity`: the requests under way on a connection. `held`: the memory kept for it. `body`: the bodies of its requests.
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

/// How long a connection that was accepted just before the stop may take to bring its first request.
const FIRST_REQUEST: Duration = Duration::from_millis(500);

/// How long an HTTP/1 connection that is idle at the stop may take to bring a request that its client sent before it knew.
const NEXT_REQUEST: Duration = Duration::from_millis(500);

/// How long an idle connection stays open after it was told to end: time for the client to read that.
const LAST_MOMENTS: Duration = Duration::from_secs(1);

/// Least bytes a second of a body that is sent or an answer that is taken, once the time limits are used up.
const LEAST_RATE: u64 = 1024;

/// Most bytes of a request's line and headers. What hyper reads of HTTP/1 it may overstep, so the routes look again.
pub(super) const HEAD_LIMIT: usize = 64 * 1024;
/// Most bytes of an HTTP/2 head that are read at all: more are refused by the library, without a body.
const HEAD_LIMIT_HTTP2: u32 = 4 * HEAD_LIMIT as u32;
/// Most headers of a request.
const HEADERS: usize = 128;
/// Requests under way on one HTTP/2 connection.
const STREAMS: u32 = 100;
/// Flow-control window of an HTTP/2 connection and of each stream, in bytes. h2 buffers no more than that of unread bodies.
const WINDOW: u32 = 512 * 1024;
/// Longest that a new connection on a full port waits for one that has been quiet long enough; then the connection without a
/// request that has been quiet the longest is evicted.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long a connection must have been quiet before it is evicted from a full port: this many milliseconds for each
/// that may be open, so that a port turns over 1000 silent connections a second, however few fit.
const QUIET: Duration = Duration::from_millis(1);
/// Bounds of that time.
const QUIET_BOUNDS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long a connection that was cut may take to be gone, before the port looks whether another must go.
const GONE: Duration = Duration::from_millis(5);
/// How often a full port looks again for a connection that could go.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How often the log says that the system is out of descriptors.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// Limits on a port's connections.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Which port, for the metrics.
    pub(super) port: Port,
    /// Connections open at once. When there are more, the one goes that has done nothing useful for the longest; where
    /// none can go, the newest waits.
    pub(super) connections: usize,
    /// Longest a client may take to send a request's head, from the connection's start or the last answer; and to send a
    /// body, beyond what its bytes take at the least rate.
    pub(super) head_timeout: Duration,
    /// Longest an answer may wait without its client taking any of it, or beyond what it takes at the least rate.
    pub(super) write_timeout: Duration,
    /// Longest that a request may be in progress.
    pub(super) longest_work: Duration,
    /// Whether a request's client sends messages when it likes.
    pub(super) is_stream: fn(&Request<Incoming>) -> bool,
    /// None: plain TCP.
    pub(super) tls: Option<Arc<Tls>>,
}

/// Connections that are still open after accepting ended.
pub(super) struct Open {
    stopping: watch::Sender<bool>,
    tasks: JoinSet<()>,
    /// Ends when this is dropped.
    _relief: JoinSet<()>,
}

impl Open {
    /// Lets every request in flight finish and closes idle connections.
    pub(super) async fn finish(&mut self) {
        self.stopping.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }

    /// Cuts what is left; returns how many.
    pub(super) async fn cut(mut self) -> usize {
        let left = self.tasks.len();
        self.tasks.shutdown().await;
        left
    }
}

/// Accepts until `stop` resolves, then hands over what is open.
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
            // keeps the set small
            Some(_) = open.tasks.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let permit = tokio::select! {
                    biased;
                    // it is connected: it is served as those are that the system still has in its queue
                    _ = &mut stop => {
                        open.tasks.spawn(serve(stream, None));
                        break;
                    }
                    permit = make_room(&room, &connections, &limits) => permit,
                };
                open.tasks.spawn(serve(stream, permit));
            }
            Err(error) => {
                // out of file descriptors, usually: one comes back with the connection that makes room
                metrics.ended(limits.port, Ending::Refused);
                failures.say(limits.port, &error);
                connections.evict(quiet(&limits), limits.longest_work);
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }
    // to their clients, those in the system's queue are connected: closing the port with them in it would reset them
    for stream in queued(listener) {
        open.tasks.spawn(serve(stream, None));
    }
    open
}

fn quiet(limits: &Limits) -> Duration {
    let connections = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    (QUIET * connections.min(10_000)).clamp(QUIET_BOUNDS.0, QUIET_BOUNDS.1)
}

/// Room for one more connection: a free place, else that of an evicted quiet connection, else of the next that ends.
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

/// Cuts connections while more is kept for them than the port allows.
async fn relieve(held: Arc<held::Port>, connections: Arc<Connections>) {
    loop {
        held.above().await;
        connections.cut_heaviest(held.limit());
        tokio::time::sleep(GONE).await;
    }
}

/// Connections that the system did not hand over.
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

/// Closes the port; returns the connections that the system had accepted already.
fn queued(listener: TcpListener) -> Vec<TcpStream> {
    // the system itself is asked: the runtime may not have heard of the latest
    let Ok(listener) = listener.into_std() else { return Vec::new() };
    let mut streams = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        streams.extend(stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)));
    }
    streams
}

/// The whole life of a connection: a handshake, where there is one, and requests.
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
                // the server ends: the next request of this client would not be read
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(mark.answer(response))
        }
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(wire), TowerToHyperService::new(service)));
    let last_call = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
        // told to shut down before its first request, a connection would drop that request unread
        let _ = tokio::time::timeout(FIRST_REQUEST, seen.wait_for(|seen| *seen)).await;
        // a request that is on its way to an HTTP/1 connection would be dropped as well; HTTP/2 tells which ones it has read
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

/// Why the library ended a connection, if it did.
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

/// Whether it was the server that ended an HTTP/2 connection.
fn broke_the_rules(error: &hyper::Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| cause.is_go_away() && cause.is_library())
}

/// An open connection in the metrics.
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
