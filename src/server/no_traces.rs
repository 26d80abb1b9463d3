//! Replaces `traces` in a build without the cargo feature `otel`: nothing can be started, so nothing is recorded.

use axum::http::HeaderMap;

use super::served::{Line, Served};

#[derive(Debug)]
pub(super) enum Traces {}

#[derive(Debug)]
pub(super) enum Arrived {}

impl Traces {
    pub(super) fn start(_: &str) -> Result<Self, String> {
        Err("this nfold was built without OpenTelemetry; build it with `--features otel`, or leave out --otlp-endpoint"
            .into())
    }

    pub(super) fn arrived(&self, _: &HeaderMap) -> Arrived {
        match *self {}
    }

    pub(super) fn record(&self, arrived: Arrived, _: &str, _: &Line<'_>, _: u16, _: Option<&Served>) {
        match arrived {}
    }

    pub(super) fn end(&self) {
        match *self {}
    }
}
