//! Why an image or a request gets no answer: one variant per cause. Status codes and headers are the server's business.

use std::time::Duration;

use crate::metrics::Outcome;
use crate::pixels::ImageError;

/// Why an image, or a whole request, got no logits.
#[derive(Debug, Clone, thiserror::Error)]
pub enum InferError {
    /// The bytes can't be decoded as an image; see [`ImageError`].
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A client's tensor for which the network computes NaN or infinity.
    #[error("{0}; send finite, normalised values")]
    BadTensor(String),
    /// An encoded image for a network whose input has neither 1 nor 3 channels.
    #[error(
        "the model takes {channels} channels, and an image has 1 or 3 (grey, RGB): send a tensor to /v2, FP32, FP16 or UINT8"
    )]
    NoImages {
        /// Channels of the network's input.
        channels: usize,
    },
    /// The model has no such output.
    #[error(
        "model `{model}` version {version} was folded without the output `{output}`; fold it with --outputs logits,features,map"
    )]
    NoOutput {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// What it lacks.
        output: &'static str,
    },
    /// The network's pooling has no class activation maps.
    #[error(
        "model `{model}` version {version} has no class activation maps: {reason}, and a map is exact for means alone"
    )]
    NoClassMaps {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// Why.
        reason: &'static str,
    },
    /// A request holds more images than may ever be admitted at once.
    #[error("{images} images in one request, at most {limit} are taken; send fewer at a time")]
    TooManyImages {
        /// Images of the request.
        images: usize,
        /// The queue's limit.
        limit: usize,
    },
    /// The queue is full, or too long for the deadline.
    #[error("the server is busy, try again in {} s", retry_after.as_secs_f64().ceil())]
    Overloaded {
        /// How long the current queue takes to drain, by the measured speed.
        retry_after: Duration,
    },
    /// The deadline passed before the answer. Nothing was computed, unless it passed during the run.
    #[error("the deadline passed before the answer was ready")]
    DeadlineExceeded,
    /// The server is stopping and admits nothing.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The model has no working engine at the moment.
    #[error("the model is not ready")]
    NotReady,
    /// No such model, or no such version of it.
    #[error("model `{model}` is not served (there is: {available})")]
    ModelNotFound {
        /// The requested model: `NAME` or `NAME version N`.
        model: String,
        /// The served models, comma-separated.
        available: String,
    },
    /// Several models are served and the request names none.
    #[error("several models are served, name one of: {available}")]
    ModelNotNamed {
        /// The served models, comma-separated.
        available: String,
    },
    /// An internal error. The text is for the log, never for the client.
    #[error("internal error: {0}")]
    Internal(String),
}

impl InferError {
    /// Whether the error is one image's rather than the whole request's.
    pub fn is_of_an_image(&self) -> bool {
        matches!(self, Self::Image(_) | Self::BadTensor(_) | Self::Internal(_))
    }

    /// The outcome that the metrics count.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Image(ImageError::Unsupported { .. }) => Outcome::UnsupportedMediaType,
            Self::Image(ImageError::TooLarge { .. }) => Outcome::ImageTooLarge,
            Self::Image(_) => Outcome::InvalidImage,
            Self::BadTensor(_)
            | Self::NoImages { .. }
            | Self::NoOutput { .. }
            | Self::NoClassMaps { .. }
            | Self::TooManyImages { .. }
            | Self::ModelNotNamed { .. } => Outcome::InvalidRequest,
            Self::Overloaded { .. } => Outcome::Overloaded,
            Self::DeadlineExceeded => Outcome::DeadlineExceeded,
            Self::ShuttingDown => Outcome::ShuttingDown,
            Self::NotReady => Outcome::NotReady,
            Self::ModelNotFound { .. } => Outcome::ModelNotFound,
            Self::Internal(_) => Outcome::Internal,
        }
    }
}
