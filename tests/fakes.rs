//! Test doubles for serving: controllable engines, and a model around them.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nfold::engine::{Backend, BackendError, Batch, Logits};
use nfold::infer::job::{OpenBackend, SchedulerOptions};
use nfold::infer::registry::Engines;
use nfold::metrics::{Metrics, Outcome};
use nfold::model::{Manifest, ModelDir};

/// Height and width of the fake network's input.
pub const SIDE: usize = 2;
pub const CLASSES: usize = 3;

/// Value that marks an image for a fault.
pub const MARK: f32 = 1000.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An error for every batch with a marked image.
    Error,
    /// A panic for every batch with a marked image.
    Panic,
    /// A panic for every batch.
    PanicAlways,
    /// NaN logits for marked images.
    Nan,
    /// Too few logits.
    Short,
    /// Logits that depend on how many images run together.
    Batched,
    /// An error for every batch of so many images or more.
    ErrorFrom(usize),
}

/// Controls of one model's engines.
#[derive(Debug, Default)]
pub struct Strings {
    /// Batches of so many images and more wait; 0: none do.
    closed: Mutex<usize>,
    opened: Condvar,
    pub opens: AtomicUsize,
    pub refuse_open: AtomicBool,
    /// Sizes of the batches run since warm-up.
    pub batches: Mutex<Vec<usize>>,
    /// The first value of every image in them.
    pub seen: Mutex<BTreeSet<i64>>,
    /// The same, in the order of the runs.
    pub order: Mutex<Vec<i64>>,
    pub delay: Mutex<Duration>,
    pub fault: Mutex<Option<Fault>>,
}

impl Strings {
    /// Blocks engines from their next run on.
    pub fn hold(&self) {
        self.hold_from(1);
    }

    /// Blocks engines from their next run of so many images on; smaller ones go on.
    pub fn hold_from(&self, images: usize) {
        *self.closed.lock().unwrap() = images;
        self.opened.notify_all();
    }

    pub fn release(&self) {
        *self.closed.lock().unwrap() = 0;
        self.opened.notify_all();
    }

    pub fn forget_warm_up(&self) {
        self.batches.lock().unwrap().clear();
        self.seen.lock().unwrap().clear();
        self.order.lock().unwrap().clear();
    }

    pub fn runs(&self) -> usize {
        self.batches.lock().unwrap().len()
    }
}

struct Puppet(Arc<Strings>);

impl Backend for Puppet {
    /// Logits of an image: its first value, its second, and 0.
    fn run(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        let strings = &self.0;
        let len = 3 * SIDE * SIDE;
        let images: Vec<&[f32]> = batch.data.chunks(len).collect();
        strings.batches.lock().unwrap().push(batch.images);
        strings.seen.lock().unwrap().extend(images.iter().map(|i| i[0] as i64));
        strings.order.lock().unwrap().extend(images.iter().map(|i| i[0] as i64));
        let mut closed = strings.closed.lock().unwrap();
        while *closed > 0 && batch.images >= *closed {
            closed = strings.opened.wait(closed).unwrap();
        }
        drop(closed);
        let delay = *strings.delay.lock().unwrap();
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        let fault = *strings.fault.lock().unwrap();
        let marked = images.iter().any(|i| i[0] == MARK);
        match fault {
            Some(Fault::Error) if marked => return Err(BackendError::Run("told to fail, secret detail".into())),
            Some(Fault::Panic) if marked => panic!("told to panic, secret detail"),
            Some(Fault::PanicAlways) => panic!("told to panic always"),
            Some(Fault::ErrorFrom(images)) if batch.images >= images => {
                return Err(BackendError::Run("told to fail, secret detail".into()));
            }
            Some(Fault::Short) => return Ok(Logits { images: 1, classes: 1, data: vec![0.0] }),
            _ => {}
        }
        let nan = |i: &[f32]| if fault == Some(Fault::Nan) && i[0] == MARK { f32::NAN } else { i[0] };
        let third = if fault == Some(Fault::Batched) { batch.images as f32 } else { 0.0 };
        let data = images.iter().flat_map(|i| [nan(i), i[1], third]).collect();
        Ok(Logits { images: batch.images, classes: CLASSES, data })
    }
}

pub fn opener(strings: &Arc<Strings>) -> OpenBackend {
    let strings = strings.clone();
    Box::new(move || {
        assert!(!strings.refuse_open.load(Ordering::SeqCst), "told not to open");
        strings.opens.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Puppet(strings.clone())))
    })
}

pub fn engines(strings: &Arc<Strings>) -> Engines {
    Engines { open: opener(strings), open_wide: None, provider: "fake", reduced: false }
}

pub fn options(workers: usize, max_batch: usize, queue_limit: usize) -> SchedulerOptions {
    SchedulerOptions {
        workers,
        max_batch,
        queue_limit,
        max_queue_wait: Duration::from_secs(60),
        standing_wait: Duration::from_secs(60),
        ..SchedulerOptions::default()
    }
}

/// A model whose image tensor is the image's bytes (mean 0, deviation 1/255).
pub fn model_dir(name: &str, version: u64) -> ModelDir {
    let manifest: Manifest = serde_json::from_value(serde_json::json!({
        "format": 1, "producer": "test", "architecture": "puppet", "precision": "fp32", "classes": CLASSES,
        "labels": ["first", "second", "third"],
        "preprocessing": {
            "height": SIDE, "width": SIDE, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear",
            "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0],
        },
        "source_sha256": "00", "onnx_sha256": "11",
        "fold": { "family": "nf", "activation": "relu", "parameters": 1, "folded_parameters": 1, "gmacs": 0.0,
                  "gate": "resize", "blocks": [] },
    }))
    .unwrap();
    ModelDir { path: "nowhere".into(), name: name.into(), version, manifest }
}

/// Images of a model that ended in `outcome`.
pub fn images(metrics: &Metrics, name: &str, outcome: Outcome) -> u64 {
    metrics.images_total.with_label_values(&[name, "1", outcome.name()]).get()
}

pub fn all_images(metrics: &Metrics, name: &str) -> u64 {
    Outcome::ALL.iter().map(|&o| images(metrics, name, o)).sum()
}

/// Waits until `holds` is true, which other threads cause.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Ends threads that run until it is set, even if the test fails.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
