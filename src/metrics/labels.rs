//! The closed sets that labels take their values from, each variant beside its value.

macro_rules! closed_sets {
    ($($(#[doc = $doc:literal])+ pub enum $set:ident {
        $($(#[doc = $what:literal])+ $variant:ident = $value:literal,)+
    })+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $set {
            $($(#[doc = $what])+ $variant,)+
        }

        impl $set {
            /// Every variant, in declaration order.
            pub const ALL: [Self; [$($value),+].len()] = [$(Self::$variant),+];

            /// Label value.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $value,)+
                }
            }
        }
    )+};
}

closed_sets! {
    /// How a request or an image ended. Closed: the outcomes of `requests_total` add up to every request.
    pub enum Outcome {
        /// Answered.
        Ok = "ok",
        /// The request itself can't be understood.
        InvalidRequest = "invalid_request",
        /// Bytes that are no image.
        InvalidImage = "invalid_image",
        /// An image past the pixel limits.
        ImageTooLarge = "image_too_large",
        /// A body past the byte limit.
        BodyTooLarge = "body_too_large",
        /// A content type or image format that is not taken.
        UnsupportedMediaType = "unsupported_media_type",
        /// A model or version that is not served.
        ModelNotFound = "model_not_found",
        /// A path that does not exist.
        NotFound = "not_found",
        /// An API key is required, and none or an unknown one was sent.
        Unauthenticated = "unauthenticated",
        /// A path that exists, with a method that it does not take.
        MethodNotAllowed = "method_not_allowed",
        /// A request line past the limit.
        UriTooLong = "uri_too_long",
        /// A request's headers past the limit.
        HeadTooLarge = "head_too_large",
        /// Refused because the queue was full.
        Overloaded = "overloaded",
        /// The deadline passed first.
        DeadlineExceeded = "deadline_exceeded",
        /// Refused because the server is stopping.
        ShuttingDown = "shutting_down",
        /// Refused because the server is not ready.
        NotReady = "not_ready",
        /// The caller went away before its answer was ready.
        Cancelled = "cancelled",
        /// A fault of the server.
        Internal = "internal",
    }

    /// The protocol of a request.
    pub enum Protocol {
        /// `/v1` of the HTTP port.
        Rest = "rest",
        /// `/v2` of the HTTP port.
        OipHttp = "oip_http",
        /// The gRPC port.
        Grpc = "grpc",
        /// A message of a stream of the gRPC port; the stream itself counts as one of `grpc`.
        GrpcStream = "grpc_stream",
        /// Health calls of the HTTP and gRPC ports, apart so that probes don't colour latency.
        Health = "health",
        /// Any other path of the HTTP port.
        Other = "other",
    }

    /// What happens to an image in the server, step by step.
    pub enum Phase {
        /// Encoded bytes to RGB.
        Decode = "decode",
        /// RGB to input tensor: resize, crop, normalise.
        Preprocess = "preprocess",
        /// Waiting: for a compute thread, then for an engine.
        Queue = "queue",
        /// One engine run, whole batch.
        Inference = "inference",
        /// Logits to predictions.
        Postprocess = "postprocess",
    }

    /// How an engine run ended.
    pub enum RunResult {
        /// Logits came back.
        Ok = "ok",
        /// The engine reported an error.
        Error = "error",
        /// The engine panicked; its session was reopened.
        Panic = "panic",
    }

    /// A port of the server.
    pub enum Port {
        /// REST, the Open Inference Protocol and the page.
        Http = "http",
        /// gRPC.
        Grpc = "grpc",
        /// Probes and scrapes.
        Admin = "admin",
    }

    /// Why the server ended a connection, or one of its requests, before the client wanted to.
    pub enum Ending {
        /// The first whole head of a request did not come in time, the TLS handshake included.
        HeadTimeout = "head_timeout",
        /// No request was open for too long.
        Idle = "idle",
        /// The client did not take its answer, or too slowly.
        WriteTimeout = "write_timeout",
        /// The client sent a body too slowly; over HTTP/2 its other requests go on.
        SlowBody = "slow_body",
        /// The port was full, and this connection was the one that had done nothing for the longest.
        Full = "full",
        /// More was kept for it than for any other connection, and for all together more than the port allows.
        Memory = "memory",
        /// A TLS handshake failed.
        Handshake = "handshake",
        /// A head that is no HTTP.
        Unreadable = "unreadable",
        /// The client broke HTTP/2's rules, or flooded the server with frames.
        Protocol = "protocol",
        /// The system had no descriptor for it.
        Refused = "refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_sets_are_indexed_by_declaration() {
        assert!(Outcome::ALL.iter().enumerate().all(|(i, &o)| o as usize == i));
        assert!(Phase::ALL.iter().enumerate().all(|(i, &p)| p as usize == i));
        assert!(RunResult::ALL.iter().enumerate().all(|(i, &r)| r as usize == i));
        assert!(Protocol::ALL.iter().enumerate().all(|(i, &p)| p as usize == i));
    }

    #[test]
    fn label_values_are_distinct() {
        let outcomes: std::collections::BTreeSet<_> = Outcome::ALL.map(Outcome::name).into();
        assert_eq!(outcomes.len(), Outcome::ALL.len());
        let endings: std::collections::BTreeSet<_> = Ending::ALL.map(Ending::name).into();
        assert_eq!(endings.len(), Ending::ALL.len());
    }
}
