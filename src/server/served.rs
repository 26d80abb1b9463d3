//! What is recorded of an answered request: for the log, the metrics, the traces and the header `server-timing`.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;

use super::bodies::budget::{Charge, ChargedBody};
use crate::infer::registry::LiveModel;
use crate::infer::request::Timings;
use crate::metrics::{Outcome, Protocol};

pub(super) const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// What a handler reports to the access log with its response, including errors of single images in a request that
/// succeeds.
#[derive(Debug, Clone)]
pub(super) struct Served {
    pub(super) model: String,
    pub(super) version: u64,
    pub(super) images: usize,
    /// The longest of all images, per phase.
    pub(super) timings: Timings,
    /// Errors of single images; for the log only.
    pub(super) faults: Vec<String>,
}

impl Served {
    /// Of a request with `images` images for `model`.
    pub(super) fn new(model: &LiveModel, images: usize) -> Self {
        let (model, version) = (model.name.clone(), model.version);
        Self { model, version, images, timings: Timings::default(), faults: Vec::new() }
    }

    /// Adds the timings of one image. Images are processed in parallel, so the longest counts.
    pub(super) fn add_timings(&mut self, b: &Timings) {
        let a = &mut self.timings;
        a.decode = a.decode.max(b.decode);
        a.preprocess = a.preprocess.max(b.preprocess);
        a.queue = a.queue.max(b.queue);
        a.inference = a.inference.max(b.inference);
        a.batch = a.batch.max(b.batch);
    }

    /// A response with this body, which `charge` is held for, and the header `server-timing`.
    pub(super) fn respond(self, kind: &'static str, body: Vec<u8>, charge: Charge) -> Response {
        let mut response = ChargedBody::respond(body.into(), charge);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Ok(value) = HeaderValue::from_str(&self.server_timing()) {
            response.headers_mut().insert(SERVER_TIMING, value);
        }
        response.extensions_mut().insert(self);
        response
    }

    /// Value of the header `server-timing`, in milliseconds.
    pub(super) fn server_timing(&self) -> String {
        let Timings { decode, preprocess, queue, inference, .. } = self.timings;
        format!(
            "decode;dur={}, preprocess;dur={}, queue;dur={}, inference;dur={}",
            millis(decode),
            millis(preprocess),
            millis(queue),
            millis(inference)
        )
    }
}

/// The fields of every access log line.
pub(super) struct Line<'a> {
    pub(super) request_id: &'a str,
    /// Of the caller's trace, if it has one.
    pub(super) trace_id: Option<&'a str>,
    pub(super) method: &'a str,
    pub(super) path: &'a str,
    pub(super) protocol: Protocol,
    pub(super) outcome: Outcome,
    pub(super) duration_ms: f64,
}

/// Milliseconds, rounded to the microsecond.
pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}
