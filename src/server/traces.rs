//! One OpenTelemetry span per request, sent to a collector (OTLP over gRPC). Built with the cargo feature `otel`.
//!
//! A span is created when its request has ended, from the data of the access log: nothing is measured twice, and
//! nothing is done while an image is in work. Names follow OpenTelemetry's semantic conventions for HTTP servers. Knows
//! nothing of handlers or models.

use std::time::SystemTime;

use axum::http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{Span as _, SpanKind, Status, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};

use super::served::{Line, Served, millis};
use crate::metrics::{Outcome, Protocol};

/// The exporter. Spans wait in a bounded queue; those that don't fit are dropped.
#[derive(Debug)]
pub(super) struct Traces {
    provider: SdkTracerProvider,
}

/// A request in progress: its start and the trace that it belongs to (W3C Trace Context).
#[derive(Debug)]
pub(super) struct Arrived {
    at: SystemTime,
    caller: Context,
}

impl Traces {
    /// Exports to `endpoint`, such as `http://localhost:4317`. Needs a runtime; the error says what is wrong with the
    /// endpoint. A collector that can't be reached is logged later.
    pub(super) fn start(endpoint: &str) -> Result<Self, String> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
        let exporter = exporter.map_err(|e| format!("can't send traces to `{endpoint}`: {e}"))?;
        let resource = Resource::builder().with_service_name("nfold");
        let resource = resource.with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))).build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            // a trace that its caller does not sample is not exported
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
            .build();
        Ok(Self { provider })
    }

    /// Records the start of a request with these headers.
    pub(super) fn arrived(&self, headers: &HeaderMap) -> Arrived {
        let caller = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        Arrived { at: SystemTime::now(), caller }
    }

    /// Exports the span of a request that has ended. Health calls have none.
    pub(super) fn record(&self, arrived: Arrived, name: &str, line: &Line<'_>, status: u16, served: Option<&Served>) {
        if line.protocol == Protocol::Health {
            return;
        }
        let mut attributes = vec![
            KeyValue::new("http.request.method", line.method.to_string()),
            KeyValue::new("url.path", line.path.to_string()),
            KeyValue::new("http.response.status_code", i64::from(status)),
            KeyValue::new("nfold.request_id", line.request_id.to_string()),
            KeyValue::new("nfold.outcome", line.outcome.name()),
        ];
        if let Some(served) = served {
            let t = &served.timings;
            attributes.extend([
                KeyValue::new("nfold.model", served.model.clone()),
                KeyValue::new("nfold.version", i64::from(served.version)),
                KeyValue::new("nfold.images", served.images as i64),
                KeyValue::new("nfold.batch", t.batch as i64),
            ]);
            let phases =
                [("decode", t.decode), ("preprocess", t.preprocess), ("queue", t.queue), ("inference", t.inference)];
            attributes
                .extend(phases.map(|(phase, elapsed)| KeyValue::new(format!("nfold.{phase}_ms"), millis(elapsed))));
        }
        let tracer = self.provider.tracer("nfold");
        let builder = tracer.span_builder(name.to_string());
        let builder = builder.with_kind(SpanKind::Server).with_start_time(arrived.at).with_attributes(attributes);
        let mut span = tracer.build_with_context(builder, &arrived.caller);
        if line.outcome == Outcome::Internal {
            span.set_status(Status::error("internal error"));
        }
        span.end();
    }

    /// Exports the waiting spans. Blocks for seconds at most: not for async threads.
    pub(super) fn end(&self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::warn!(%error, "the last traces were not sent: {error}");
        }
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(axum::http::HeaderName::as_str).collect()
    }
}
