//! The closed sets of label values: each variant with its value.

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
    /// How a request or an image ended. The outcomes of `requests_total` add up to all requests.
    pub enum Outcome {
        /// Answered.
        Ok = "ok",
        /// The request can't be understood.
        InvalidRequest = "invalid_request",
        /// The bytes are no image.
        InvalidImage = "invalid_image",
        /// An image above the pixel limits.
        ImageTooLarge = "image_too_large",
        /// A body above the byte limit.
        BodyTooLarge = "body_too_large",
        /// An unsupported content type or image format.
        UnsupportedMediaType = "unsupported_media_type",
        /// A model or version that is not served.
        ModelNotFound = "model_not_found",
        /// A path that does not exist.
        NotFound = "not_found",
        /// An API key is required, and none or an unknown one was sent.
        Unauthenticated = "unauthenticated",
        /// An existing path with a method that it does not support.
        MethodNotAllowed = "method_not_allowed",
        /// A request line above the limit.
        UriTooLong = "uri_too_long",
        /// Headers above the limit.
        HeadTooLarge = "head_too_large",
        /// Refused because the queue was full.
        Overloaded = "overloaded",
        /// The deadline passed first.
        DeadlineExceeded = "deadline_exceeded",
        /// Refused because the server is stopping.
        ShuttingDown = "shutting_down",
        /// Refused because the server is not ready.
        NotReady = "not_ready",
        /// The client disconnected before the response was ready.
        Cancelled = "cancelled",
        /// An internal error.
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
        /// A message of a gRPC stream; the stream itself counts as one request of `grpc`.
        GrpcStream = "grpc_stream",
        /// Health calls of the HTTP and gRPC ports, separate so that probes don't distort latency.
        Health = "health",
        /// Any other path of the HTTP port.
        Other = "other",
    }

    /// The phases of an image in the server.
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
        /// It returned logits.
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

    /// Why the server ended a connection, or one of its requests, before the client did.
    pub enum Ending {
        /// The first complete head of a request did not arrive in time; the TLS handshake counts too.
        HeadTimeout = "head_timeout",
        /// No request was open for too long.
        Idle = "idle",
        /// The client did not read its response, or read it too slowly.
        WriteTimeout = "write_timeout",
        /// The client sent a body too slowly; over HTTP/2 its other requests go on.
        SlowBody = "slow_body",
        /// The port was full, and this connection had been quiet the longest.
        Full = "full",
        /// The port kept more memory than allowed, and most of it for this connection.
        Memory = "memory",
        /// A TLS handshake failed.
        Handshake = "handshake",
        /// A head that can't be parsed as HTTP.
        Unreadable = "unreadable",
        /// The client broke HTTP/2's rules, or flooded the server with frames.
        Protocol = "protocol",
        /// The system had no file descriptor for it.
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
