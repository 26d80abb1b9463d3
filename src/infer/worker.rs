//! The compute threads: decode, resize, run, answer.
//!
//! A worker owns its engine (running takes `&mut`) and survives a panic in it: the engine is reopened, and the batch is
//! retried one image at a time. A decoder has no engine. The queue decides what to do next.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use super::error::InferError;
use super::lane::Lane;
use super::line::{Entry, Memory, Parked, Prepared};
use super::queue::{Able, Task};
use super::request::{Input, Output, Timings};
use super::shared::{Caller, Done, Shared};
use crate::engine::{Answers, Batch, Extras};
use crate::metrics::Phase;
use crate::panics::message;
use crate::pixels::{Claim, ImageError};

/// The role of a compute thread.
#[derive(Debug, Clone, Copy)]
pub(super) enum Role {
    /// Owns the engine with this number.
    Worker(usize),
    /// Only decodes and resizes images.
    Decoder,
}

/// Runs a compute thread to its end. A worker reports once: warm, or why not.
pub(super) fn main(shared: &Shared, thread: usize, role: Role) {
    let lane = match role {
        Role::Decoder => Some(None),
        Role::Worker(number) => match Lane::open(shared, number) {
            Ok((lane, warm)) => {
                shared.engines(1);
                shared.report(Ok(warm));
                Some(Some(lane))
            }
            Err(error) => {
                shared.report(Err(error));
                None
            }
        },
    };
    let Some(mut lane) = lane else { return shared.ended() };
    let caller = Caller { thread, waker: shared.system().current() };
    let worked = catch_unwind(AssertUnwindSafe(|| work(shared, &caller, &mut lane)));
    let is_worker = lane.is_some();
    if let Some(lane) = lane {
        // a model without any engine is not ready
        lane.close(shared);
    }
    if worked.is_err() {
        shared.died(thread, is_worker);
    }
    shared.ended();
    if let Err(panic) = worked {
        resume_unwind(panic);
    }
}

fn work(shared: &Shared, caller: &Caller, lane: &mut Option<Lane>) {
    let mut done = Done::Nothing;
    loop {
        let able = Able {
            worker: lane.as_ref().map(|lane| lane.number),
            prepares: lane.is_none() || shared.options.decoders == 0,
            runs: lane.as_ref().is_some_and(Lane::runs),
            reopen_at: lane.as_ref().and_then(Lane::reopen_at),
            warms_up: lane.as_ref().is_some_and(Lane::warms_up),
        };
        done = match (shared.next(caller, able, done), lane.as_mut()) {
            (Task::Prepare(entry), _) => catch_unwind(AssertUnwindSafe(|| prepare(shared, entry)))
                .unwrap_or(Done::Prepared(None, Duration::ZERO)),
            (Task::Run { images, alone }, Some(lane)) => {
                // decoders and engines catch panics themselves; after any other panic the thread goes on
                if catch_unwind(AssertUnwindSafe(|| run(shared, lane, images, alone))).is_err() {
                    lane.lose(shared);
                }
                // a worker that always has work gets warm, too; a stop is not to wait for that
                if shared.is_open() {
                    lane.warm_up(shared);
                }
                Done::Nothing
            }
            (Task::WarmUp, Some(lane)) => {
                lane.warm_up(shared);
                Done::Nothing
            }
            (Task::Reopen, Some(lane)) => {
                lane.reopen(shared);
                Done::Nothing
            }
            // only threads with a lane get batches
            (Task::Run { .. } | Task::Reopen | Task::WarmUp, None) => Done::Nothing,
            (Task::Stop, _) => break,
        };
    }
}

fn prepare(shared: &Shared, entry: Entry) -> Done {
    let Entry { input, pending, memory } = entry;
    let started = shared.now();
    let since = |started| shared.now().saturating_duration_since(started);
    let ready = |tensor, pending| {
        let prepared = Prepared { tensor, decode: Duration::ZERO, preprocess: since(started), pending };
        Done::Prepared(Some(prepared), Duration::ZERO)
    };
    let bytes = match input {
        Input::Encoded(bytes) => bytes,
        Input::Tensor(tensor) => return ready(tensor, pending),
        Input::Raw(raw) => return ready(raw.tensor(&shared.job.preprocessor), pending),
    };
    let job = &shared.job;
    // decoding takes long: the simulation lets other threads run meanwhile
    shared.system().step();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let image = shared.options.decoder.open(&bytes, job.exif_orientation)?;
        let share = match memory {
            Memory::Held(share) => share,
            Memory::Unasked => {
                let need = image.need();
                let scratch = job.preprocessor.scratch(need.width, need.height);
                let mut claim = shared.options.decode_memory.claim(need.bytes + scratch);
                match claim.try_take() {
                    Some(share) => share,
                    None => return Err(Unprepared::Waits(claim)),
                }
            }
        };
        let decoded = image.decode(|width, height| job.preprocessor.resized(width, height));
        let decode = since(started);
        shared.metrics().phase(Phase::Decode, decode);
        let mut tensor = vec![0.0; job.preprocessor.tensor_len()];
        job.preprocessor.apply(&decoded?, &mut tensor);
        drop(share);
        let preprocess = since(started).saturating_sub(decode);
        shared.metrics().phase(Phase::Preprocess, preprocess);
        Ok((tensor, decode, preprocess))
    }));
    let took = since(started);
    let error = match result {
        Ok(Ok((tensor, decode, preprocess))) => {
            return Done::Prepared(Some(Prepared { tensor, decode, preprocess, pending }), took);
        }
        Ok(Err(Unprepared::Waits(claim))) => {
            let entry = Entry { input: Input::Encoded(bytes), pending, memory: Memory::Unasked };
            return Done::Parked(Parked { entry, claim });
        }
        Ok(Err(Unprepared::Refused(error))) => {
            shared.metrics().decode_reject(error.reason());
            error.into()
        }
        Err(panic) => InferError::Internal(format!("decoding panicked: {}", message(panic.as_ref()))),
    };
    pending.answer(Err(error), shared.now());
    Done::Prepared(None, took)
}

/// Why an image could not be decoded into a tensor.
enum Unprepared {
    Refused(ImageError),
    /// There is no memory to decode it at the moment.
    Waits(Claim),
}

impl From<ImageError> for Unprepared {
    fn from(error: ImageError) -> Self {
        Self::Refused(error)
    }
}

fn run(shared: &Shared, lane: &mut Lane, mut images: Vec<Prepared>, alone: bool) {
    let started = shared.now();
    let since = |started| shared.now().saturating_duration_since(started);
    let count = images.len();
    let (height, width) = (shared.job.preprocessor.height(), shared.job.preprocessor.width());
    let data = match images.as_mut_slice() {
        [only] => std::mem::take(&mut only.tensor),
        several => {
            // copied by slices: value by value it would take longer than a GPU computes
            let mut data = Vec::with_capacity(shared.options.padded(count) * shared.job.preprocessor.tensor_len());
            several.iter_mut().for_each(|image| data.append(&mut image.tensor));
            data
        }
    };
    let mut batch = Batch { images: count, height, width, data };
    let extras = images.iter().fold(Extras::NONE, |extras, image| extras.and(image.pending.extras));
    let wide = if alone { lane.attempt_wide(shared, &mut batch, extras) } else { None };
    if wide.is_none() && alone && images.iter().all(|image| image.pending.is_expired(shared.now(), Duration::ZERO)) {
        // too late to try again
        for image in images {
            image.pending.answer(Err(InferError::DeadlineExceeded), shared.now());
        }
        return;
    }
    match wide.map_or_else(|| lane.attempt(shared, &mut batch, extras), Ok) {
        Ok(answers) => {
            let took = since(started);
            let input = images.iter().map(|image| image.decode + image.preprocess).sum();
            shared.metrics().statistics.ran(count, input, took);
            for (i, image) in images.into_iter().enumerate() {
                let row = Row::of(&answers, i, image.pending.extras, &batch.data);
                answer(shared, image, (started, took), count, Ok(row));
            }
        }
        Err(reason) if count == 1 => {
            for image in images {
                answer(shared, image, (started, since(started)), 1, Err(reason.clone()));
            }
        }
        Err(reason) => {
            // one at a time: a bad image must not fail the others of its batch
            tracing::warn!(
                model = shared.job.what,
                images = count,
                reason,
                "a batch failed, its images are run one by one"
            );
            let len = batch.data.len() / count;
            for (image, data) in images.into_iter().zip(batch.data.chunks(len.max(1))) {
                if image.pending.is_expired(shared.now(), Duration::ZERO) {
                    image.pending.answer(Err(InferError::DeadlineExceeded), shared.now());
                    continue;
                }
                if !lane.runs() {
                    lane.reopen(shared);
                }
                let started = shared.now();
                let extras = image.pending.extras;
                let mut batch = Batch { images: 1, height, width, data: data.to_vec() };
                let row = lane.attempt(shared, &mut batch, extras);
                let row = row.map(|answers| Row::of(&answers, 0, extras, &batch.data));
                if row.is_ok() {
                    shared.metrics().statistics.ran(1, image.decode + image.preprocess, since(started));
                }
                answer(shared, image, (started, since(started)), 1, row);
            }
        }
    }
}

/// What a run gave for one image.
struct Row {
    logits: Vec<f32>,
    features: Vec<f32>,
    map: Vec<f32>,
    input: Vec<f32>,
}

impl Row {
    /// Image `i` of a batch, whose tensors are `inputs`.
    fn of(answers: &Answers, i: usize, asked: Extras, inputs: &[f32]) -> Self {
        let images = answers.logits.images.max(1);
        let part = |values: &[f32], wanted: bool| {
            let len = values.len() / images;
            if wanted { values[i * len..(i + 1) * len].to_vec() } else { Vec::new() }
        };
        Self {
            logits: answers.logits.row(i).to_vec(),
            features: part(&answers.features, asked.features),
            map: part(&answers.map, asked.map),
            input: part(inputs, asked.map),
        }
    }
}

fn answer(shared: &Shared, image: Prepared, run: (Instant, Duration), batch: usize, row: Result<Row, String>) {
    let Prepared { decode, preprocess, pending, .. } = image;
    let (started, inference) = run;
    let queue = started.saturating_duration_since(pending.arrived).saturating_sub(decode + preprocess);
    shared.metrics().phase(Phase::Queue, queue);
    let timings = Timings { decode, preprocess, queue, inference, batch };
    let output = row.map(|Row { logits, features, map, input }| Output { logits, features, map, input, timings });
    pending.answer(output.map_err(InferError::Internal), shared.now());
}
