//! Spans of requests, at a collector that records what it receives. Only in builds with the cargo feature `otel`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use nfold::server::Options;

use crate::fakes::{eventually, options};
use crate::serve::{ask, local, png, start};

/// Answers every export with an empty message and status 0.
fn collector() -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let keep = kept.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let keep = keep.clone();
                let service = tower::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                    let keep = keep.clone();
                    async move {
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        keep.lock().unwrap().extend_from_slice(&body);
                        let end = hyper::HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
                        let frames =
                            [Frame::data(Bytes::from_static(&[0; 5])), Frame::trailers(end)].map(Ok::<_, Infallible>);
                        let answer = hyper::Response::builder().header("content-type", "application/grpc");
                        Ok::<_, Infallible>(answer.body(StreamBody::new(tokio_stream::iter(frames))).unwrap())
                    }
                });
                let serving = async move {
                    let service = TowerToHyperService::new(service);
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
                };
                tokio::spawn(serving);
            }
        });
    });
    (address, kept)
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|w| w == part)
}

#[test]
fn a_request_is_a_span_of_its_callers_trace() {
    let (collector, kept) = collector();
    let server = Options { otlp_endpoint: Some(format!("http://{collector}")), ..local() };
    let server = start(server, options(1, 4, 16));
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let unsampled = "00000000000000000000000000abcdef";
    let of = |trace: &str, flags: &str| format!("00-{trace}-00f067aa0ba902b7-{flags}");
    assert_eq!(server.classify("", &[("traceparent", &of(trace, "01"))], &png(255)).status, 200);
    assert_eq!(server.classify("?model=other", &[("traceparent", &of(unsampled, "00"))], &png(255)).status, 404);
    assert_eq!(ask(server.http, "GET /v2/health/live", &[], b"").status, 200);
    assert_eq!(ask(server.http, "GET /nowhere", &[("x-request-id", "mine")], b"").status, 404);
    assert_eq!(ask(server.http, "GET /v2/models/made-up", &[], b"").status, 404);
    // shutdown exports the waiting spans
    server.end().unwrap();
    let bytes = |hexadecimal: &str| -> Vec<u8> {
        (0..hexadecimal.len()).step_by(2).map(|i| u8::from_str_radix(&hexadecimal[i..i + 2], 16).unwrap()).collect()
    };
    eventually("spans come", || holds(&kept.lock().unwrap(), b"/nowhere"));
    let kept = kept.lock().unwrap();
    for part in ["POST /v1/classify", "nfold.inference_ms", "nfold.model", "service.name", "mine", "not_found"] {
        assert!(holds(&kept, part.as_bytes()), "{part}");
    }
    assert!(!holds(&kept, b"GET /nowhere"), "a name of a client's making");
    assert!(holds(&kept, b"GET /v2/models/{model}"), "a route's template");
    assert!(holds(&kept, &bytes(trace)) && holds(&kept, &bytes("00f067aa0ba902b7")), "the caller's trace and span");
    assert!(!holds(&kept, &bytes(unsampled)), "not what its caller does not sample");
    assert!(!holds(&kept, b"/v2/health/live"), "no probes");
}
