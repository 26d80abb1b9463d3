//! One image from the caller's side: the input, its terms (deadline, priority) and the answer.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::error::InferError;
pub use crate::engine::Extras;
use crate::pixels::RawTensor;

/// Deadline and priority of a request.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// The deadline.
    pub deadline: Instant,
    /// 1 is served first; 0 is [`DEFAULT_PRIORITY`]. Equal priorities are served in order of arrival. [`Class`] says
    /// how much a priority weighs.
    pub priority: u32,
}

/// The priority of a request that names none.
pub const DEFAULT_PRIORITY: u32 = 100;

/// A range of priorities, and its share of the engines. Clients choose their priorities, so none may starve the others:
/// of four images dequeued, one is of the default class, and of sixteen one of the last, as long as any wait; and the
/// first and the last class together have at most three quarters of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Priorities 1 to 99.
    First,
    /// Priority 100, also of requests that name none.
    Default,
    /// Priorities above 100.
    Last,
}

impl Class {
    /// Every class, in the order in which they are served.
    pub const ALL: [Self; 3] = [Self::First, Self::Default, Self::Last];

    /// The class of a priority.
    pub fn of(priority: u32) -> Self {
        match priority {
            0 | DEFAULT_PRIORITY => Self::Default,
            1..DEFAULT_PRIORITY => Self::First,
            _ => Self::Last,
        }
    }
}

impl From<Instant> for Terms {
    fn from(deadline: Instant) -> Self {
        Self { deadline, priority: 0 }
    }
}

/// One image, as the caller sends it.
#[derive(Debug, Clone)]
pub enum Input {
    /// A JPEG, PNG … file.
    Encoded(Bytes),
    /// A tensor ready for the network, `[channels, height, width]`.
    Tensor(Vec<f32>),
    /// A tensor or pixels, as bytes.
    Raw(RawTensor),
}

impl Input {
    /// Whether it can be a network's input of `len` values. Encoded images can, until they are decoded.
    pub(super) fn fits(&self, len: usize) -> bool {
        match self {
            Self::Encoded(_) => true,
            Self::Tensor(values) => values.len() == len,
            Self::Raw(raw) => raw.values() == Some(len),
        }
    }
}

/// Where an image's time went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Decoding.
    pub decode: Duration,
    /// Resizing, cropping, normalising.
    pub preprocess: Duration,
    /// Waiting, from admission to the engine run, without the two above.
    pub queue: Duration,
    /// The engine run.
    pub inference: Duration,
    /// Images in that run.
    pub batch: usize,
}

/// The answer for one image.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[classes]`.
    pub logits: Vec<f32>,
    /// The vector that the classifier reads, `[width]`; empty where it was not asked for.
    pub features: Vec<f32>,
    /// The map that is pooled, `[channels, height, width]`; empty where it was not asked for.
    pub map: Vec<f32>,
    /// What the network saw, `[channels, height, width]`, normalised; empty where the map was not asked for.
    pub input: Vec<f32>,
    /// Where the time went.
    pub timings: Timings,
}

/// The caller's end of one admitted image. Dropping it cancels the image, unless an engine runs it already.
#[derive(Debug)]
pub struct Ticket {
    pub(super) reply: oneshot::Receiver<Result<Output, InferError>>,
    pub(super) deadline: Instant,
}

impl Ticket {
    /// The image's logits; [`InferError::DeadlineExceeded`] once the deadline has passed.
    pub async fn answer(self) -> Result<Output, InferError> {
        match tokio::time::timeout_at(self.deadline.into(), self.reply).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(InferError::Internal("an image was dropped without an answer".into())),
            Err(_) => Err(InferError::DeadlineExceeded),
        }
    }
}

/// Makes a vector's length 1. One of zeros stays.
pub fn normalise(vector: &mut [f32]) {
    let length = vector.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
}
