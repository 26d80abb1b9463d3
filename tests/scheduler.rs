//! The queue with engines that are slow, failing, panicking and lying: what is admitted is answered once, by its own
//! answer, and never more is admitted than there is room for.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nfold::infer::engine::{Backend, BackendError, Batch, Logits};
use nfold::infer::error::InferError;
use nfold::infer::image::ImageLimits;
use nfold::infer::resize::Preprocessor;
use nfold::infer::scheduler::{Input, Job, Scheduler, SchedulerOptions, Ticket};
use nfold::metrics::Metrics;
use nfold::model::{CropMode, Interpolation, Preprocessing};

const CLASSES: usize = 3;
/// Values of an image: 3 x 1 x 1.
const LEN: usize = 3;
/// An image that no engine survives, and one that no engine can run.
const PANICS: f32 = -666.0;
const FAILS: f32 = -13.0;

/// Answers with the image's own first value, after a while.
struct Fake {
    delay: Duration,
    seen: Arc<Mutex<Vec<Vec<f32>>>>,
}

impl Backend for Fake {
    fn run(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        std::thread::sleep(self.delay);
        let firsts: Vec<f32> = batch.data.chunks(LEN).map(|image| image[0]).collect();
        self.seen.lock().unwrap().push(firsts.clone());
        assert!(!firsts.contains(&PANICS), "the fake engine was told to panic");
        if firsts.contains(&FAILS) {
            return Err(BackendError::Run("told to fail".into()));
        }
        let data = firsts.iter().flat_map(|f| [*f, 0.0, 1.0]).collect();
        Ok(Logits { images: batch.images, classes: CLASSES, data })
    }
}

struct House {
    scheduler: Arc<Scheduler>,
    metrics: Arc<Metrics>,
    seen: Arc<Mutex<Vec<Vec<f32>>>>,
    opened: Arc<AtomicUsize>,
}

impl House {
    fn new(delay_ms: u64, options: SchedulerOptions) -> Self {
        let metrics = Arc::new(Metrics::new());
        let (seen, opened) = (Arc::new(Mutex::default()), Arc::new(AtomicUsize::new(0)));
        let (for_engines, count) = (Arc::clone(&seen), opened.clone());
        let job = Job {
            what: "fake".into(),
            preprocessor: Preprocessor::new(&Preprocessing {
                height: 1,
                width: 1,
                crop_pct: 1.0,
                crop_mode: CropMode::Center,
                interpolation: Interpolation::Bilinear,
                mean: [0.5; 3],
                std: [0.5; 3],
                exif_orientation: false,
            }),
            exif_orientation: false,
            classes: CLASSES,
            open: Box::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
                let (delay, seen) = (Duration::from_millis(delay_ms), for_engines.clone());
                Ok(Box::new(Fake { delay, seen }))
            }),
            metrics: metrics.model("fake", 1, "cpu"),
        };
        let scheduler = Arc::new(Scheduler::start(job, options).unwrap());
        seen.lock().unwrap().clear(); // warm-up
        Self { scheduler, metrics, seen, opened }
    }

    fn submit(&self, value: f32) -> Result<Ticket, InferError> {
        self.submit_by(value, Instant::now() + Duration::from_secs(20))
    }

    fn submit_by(&self, value: f32, deadline: Instant) -> Result<Ticket, InferError> {
        let mut tickets = self.scheduler.submit(vec![Input::Tensor(vec![value, 0.0, 0.0])], deadline)?;
        Ok(tickets.remove(0))
    }

    /// Waits for the threads: an image is counted just after its answer.
    fn settle(&self) {
        self.scheduler.close();
        assert_eq!(self.scheduler.join(Instant::now() + Duration::from_secs(5)), 0);
    }

    fn depth(&self) -> i64 {
        self.metrics.queue_depth.with_label_values(&["fake", "1"]).get()
    }

    fn images(&self, outcome: &str) -> u64 {
        self.metrics.images_total.with_label_values(&["fake", "1", outcome]).get()
    }

    fn ran(&self) -> Vec<f32> {
        self.seen.lock().unwrap().concat()
    }
}

fn options(workers: usize, max_batch: usize, queue_limit: usize) -> SchedulerOptions {
    SchedulerOptions {
        workers,
        decoders: 0,
        max_batch,
        max_queue_delay: Duration::ZERO,
        queue_limit,
        image_limits: ImageLimits::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_belongs_to_its_image() {
    let house = House::new(1, options(2, 4, 1000));
    let tickets: Vec<_> = (100..700).map(|i| (i as f32, house.submit(i as f32).unwrap())).collect();
    for (value, ticket) in tickets {
        assert_eq!(ticket.answer().await.unwrap().logits, [value, 0.0, 1.0]);
    }
    let largest = house.seen.lock().unwrap().iter().map(Vec::len).max();
    assert_eq!(largest, Some(4), "a backlog is batched, up to the limit");
    assert_eq!(house.ran().len(), 600, "nothing runs twice");
    house.settle();
    assert_eq!((house.depth(), house.images("ok")), (0, 600));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_admitted_than_there_is_room_for() {
    let house = House::new(20, options(1, 1, 5));
    let (mut admitted, mut refused) = (Vec::new(), 0);
    for i in 0..40 {
        match house.submit(i as f32) {
            Ok(ticket) => admitted.push(ticket),
            Err(InferError::Overloaded { retry_after }) => {
                assert!(retry_after >= Duration::from_millis(100));
                refused += 1;
            }
            Err(other) => panic!("{other}"),
        }
        assert!(house.depth() <= 5, "{}", house.depth());
    }
    assert!(admitted.len() >= 5 && refused >= 25, "{} admitted, {refused} refused", admitted.len());
    // a request with several images takes as many slots, or none
    let many = vec![Input::Tensor(vec![0.0; LEN]); 6];
    let later = Instant::now() + Duration::from_secs(9);
    assert!(matches!(house.scheduler.submit(many, later), Err(InferError::TooManyImages { images: 6, limit: 5 })));
    for ticket in admitted {
        ticket.answer().await.unwrap();
    }
    assert_eq!(house.depth(), 0);
    assert!(house.submit(1.0).is_ok(), "there is room again");
}

#[tokio::test(flavor = "multi_thread")]
async fn late_and_abandoned_images_are_not_run() {
    let house = House::new(150, options(1, 1, 100));
    let first = house.submit(1.0).unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await; // the engine has it
    let late = house.submit_by(2.0, Instant::now() + Duration::from_millis(60));
    drop(house.submit(3.0).unwrap());
    let last = house.submit(4.0).unwrap();
    match late {
        Ok(ticket) => assert!(matches!(ticket.answer().await, Err(InferError::DeadlineExceeded))),
        // refused at once, as the queue can't be drained in time
        Err(error) => assert!(matches!(error, InferError::Overloaded { .. }), "{error}"),
    }
    first.answer().await.unwrap();
    last.answer().await.unwrap();
    assert_eq!(house.ran(), [1.0, 4.0]);
    assert!(matches!(house.submit_by(5.0, Instant::now()), Err(InferError::DeadlineExceeded)));
    house.settle();
    assert_eq!((house.depth(), house.images("cancelled")), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_image_does_not_spoil_its_neighbours() {
    for bad in [FAILS, PANICS] {
        let house = House::new(30, options(1, 8, 100));
        let opened = house.opened.load(Ordering::SeqCst);
        let blocker = house.submit(0.5).unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
        let values = [1.0, 2.0, bad, 3.0];
        let tickets: Vec<_> = values.iter().map(|v| house.submit(*v).unwrap()).collect();
        blocker.answer().await.unwrap();
        for (value, ticket) in values.iter().zip(tickets) {
            match ticket.answer().await {
                Ok(output) => assert_eq!((output.logits[0], *value == bad), (*value, false)),
                Err(error) => {
                    assert!(matches!(error, InferError::Internal(_)) && *value == bad, "{value}: {error}");
                }
            }
        }
        assert!(house.seen.lock().unwrap().iter().any(|run| run.len() == 4), "they were one batch");
        assert_eq!(house.opened.load(Ordering::SeqCst) > opened, bad == PANICS, "an engine that panicked is replaced");
        assert_eq!(house.submit(9.0).unwrap().answer().await.unwrap().logits[0], 9.0, "the worker lives");
        house.settle();
        assert_eq!((house.depth(), house.images("internal")), (0, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_are_none_are_refused_alone() {
    let house = House::new(1, options(2, 4, 100));
    let deadline = Instant::now() + Duration::from_secs(9);
    let inputs = vec![
        Input::Encoded("no image".into()),
        Input::Tensor(vec![7.0, 0.0, 0.0]),
        Input::Encoded(bytes::Bytes::new()),
    ];
    let mut answers = Vec::new();
    for ticket in house.scheduler.submit(inputs, deadline).unwrap() {
        answers.push(ticket.answer().await);
    }
    assert!(matches!(answers[0], Err(InferError::Image(_))) && matches!(answers[2], Err(InferError::Image(_))));
    assert_eq!(answers[1].as_ref().unwrap().logits[0], 7.0);
    assert_eq!(house.depth(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_answers_what_is_queued_and_aborting_refuses_it() {
    let house = House::new(20, options(2, 2, 100));
    let tickets: Vec<_> = (1..9).map(|i| house.submit(i as f32).unwrap()).collect();
    house.scheduler.close();
    assert!(matches!(house.submit(9.0), Err(InferError::ShuttingDown)));
    for ticket in tickets {
        ticket.answer().await.unwrap();
    }
    assert_eq!(house.scheduler.join(Instant::now() + Duration::from_secs(5)), 0);

    let house = House::new(200, options(1, 1, 100));
    let tickets: Vec<_> = (1..4).map(|i| house.submit(i as f32).unwrap()).collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    house.scheduler.abort();
    let mut refused = 0;
    for ticket in tickets {
        refused += usize::from(matches!(ticket.answer().await, Err(InferError::ShuttingDown)));
    }
    assert_eq!(refused, 2, "one was running, two were waiting");
    assert_eq!(house.scheduler.join(Instant::now() + Duration::from_secs(5)), 0);
    assert_eq!(house.depth(), 0);
}

/// Many callers at once, some of whom give up: every image ends in exactly one outcome.
#[tokio::test(flavor = "multi_thread")]
async fn outcomes_add_up_under_load() {
    let house = Arc::new(House::new(2, options(2, 4, 16)));
    let (sent, answered) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(HashSet::new())));
    let callers: Vec<_> = (0..8)
        .map(|caller| {
            let (house, sent, answered) = (house.clone(), sent.clone(), answered.clone());
            tokio::spawn(async move {
                for i in 0..100 {
                    let value = (1000 * caller + i + 1) as f32;
                    sent.fetch_add(1, Ordering::SeqCst);
                    let Ok(ticket) = house.submit(value) else { continue };
                    if i % 10 == 9 {
                        drop(ticket);
                    } else if let Ok(output) = ticket.answer().await {
                        assert_eq!(output.logits[0], value);
                        assert!(answered.lock().unwrap().insert(value.to_bits()));
                    }
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    house.settle();
    let outcomes = ["ok", "overloaded", "cancelled", "deadline_exceeded", "internal"].map(|o| house.images(o));
    assert_eq!(outcomes.iter().sum::<u64>(), sent.load(Ordering::SeqCst) as u64, "{outcomes:?}");
    assert!(outcomes[0] >= answered.lock().unwrap().len() as u64 && outcomes[4] == 0, "{outcomes:?}");
    assert_eq!(house.depth(), 0);
}
