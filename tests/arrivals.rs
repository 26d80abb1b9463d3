//! The scheduler under random arrivals: with any order, engines and patience, every image is answered once and with its
//! own answer, and every slot is freed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nfold::infer::error::InferError;
use nfold::infer::job::{Job, SchedulerOptions};
use nfold::infer::request::{Input, Terms, Ticket};
use nfold::infer::scheduler::Scheduler;
use nfold::infer::system::Os;
use nfold::metrics::{Metrics, Outcome};
use nfold::pixels::Preprocessor;
use proptest::prelude::*;

use crate::fakes::{CLASSES, Fault, MARK, SIDE, Strings, all_images, eventually, images, model_dir, opener, options};

/// Long enough for everything.
const PATIENT: Duration = Duration::from_secs(20);

/// One request of up to four images.
#[derive(Debug, Clone)]
struct Arrival {
    /// Time since the previous one.
    gap: Duration,
    images: usize,
    /// Whether the first image is marked, so that the fault applies to it.
    marked: bool,
    patience: Duration,
    priority: u32,
    /// The client leaves after this time, answered or not.
    leaves: Option<Duration>,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let micros = |most: u64| (0..=most).prop_map(Duration::from_micros);
    let patience = prop_oneof![4 => Just(PATIENT), 1 => micros(3_000)];
    let leaves = prop_oneof![4 => Just(None), 1 => micros(2_000).prop_map(Some)];
    (micros(300), 1..=4_usize, prop::bool::weighted(0.1), patience, 0..4_u32, leaves).prop_map(
        |(gap, images, marked, patience, priority, leaves)| Arrival { gap, images, marked, patience, priority, leaves },
    )
}

#[derive(Debug, Clone)]
struct Setting {
    options: SchedulerOptions,
    wide: bool,
    fault: Option<Fault>,
    run: Duration,
}

fn setting() -> impl Strategy<Value = Setting> {
    let fault = prop::option::of(prop_oneof![Just(Fault::Error), Just(Fault::Panic), Just(Fault::Nan)]);
    let buckets = prop_oneof![Just(vec![]), Just(vec![1, 3, 6])];
    let numbers = (1..=3_usize, 0..=2_usize, 1..=6_usize, 4..=24_usize);
    (numbers, buckets, any::<bool>(), fault, 0..=1_u64, 0..=400_u64).prop_map(
        |((workers, decoders, max_batch, limit), buckets, wide, fault, delay, run)| Setting {
            options: SchedulerOptions {
                decoders,
                buckets,
                max_queue_delay: Duration::from_millis(delay),
                ..options(workers, max_batch, limit)
            },
            wide,
            fault,
            run: Duration::from_micros(run),
        },
    )
}

fn tensor(id: f32) -> Input {
    let mut values = vec![0.0; 3 * SIDE * SIDE];
    values[0] = id;
    Input::Tensor(values)
}

/// What the clients received.
#[derive(Debug, Default)]
struct Seen {
    answered: u64,
    internal: u64,
}

/// Waits as a client does; checks that the answer is the image's own.
async fn wait(ticket: Ticket, id: f32, fault: Option<Fault>, patience: Duration, seen: &mut Seen) {
    match ticket.answer().await {
        Ok(output) if id == MARK && fault == Some(Fault::Nan) => {
            assert!(output.logits[0].is_nan());
            seen.answered += 1;
        }
        Ok(output) => {
            assert_eq!(output.logits, [id, 0.0, 0.0]);
            seen.answered += 1;
        }
        Err(InferError::Internal(why)) => {
            assert!(id == MARK, "image {id} has no fault, and yet: {why}");
            seen.internal += 1;
        }
        Err(InferError::DeadlineExceeded) => assert!(patience < PATIENT, "image {id} was forgotten"),
        Err(other) => panic!("image {id}: {other}"),
    }
}

fn play(setting: &Setting, arrivals: &[Arrival]) {
    let (strings, metrics) = (Arc::new(Strings::default()), Metrics::new());
    let job = Job {
        what: "m/1".into(),
        preprocessor: Preprocessor::new(&model_dir("m", 1).manifest.preprocessing),
        exif_orientation: false,
        classes: CLASSES,
        open: opener(&strings),
        open_wide: setting.wide.then(|| opener(&strings)),
        golden: None,
        metrics: metrics.model("m", 1, "fake"),
        system: Arc::new(Os),
    };
    let scheduler = Scheduler::start(job, setting.options.clone()).unwrap();
    *strings.fault.lock().unwrap() = setting.fault;
    *strings.delay.lock().unwrap() = setting.run;
    let limit = setting.options.queue_limit as i64;
    let depth = metrics.queue_depth.with_label_values(&["m", "1"]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (mut asked, mut seen) = (0, Seen::default());
    runtime.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for (number, arrival) in arrivals.iter().enumerate() {
            tokio::time::sleep(arrival.gap).await;
            let ids: Vec<f32> = (0..arrival.images)
                .map(|i| if arrival.marked && i == 0 { MARK } else { (number * 10 + i) as f32 + 2000.0 })
                .collect();
            let terms = Terms { deadline: Instant::now() + arrival.patience, priority: arrival.priority };
            asked += arrival.images as u64;
            let tickets = match scheduler.submit(ids.iter().map(|&id| tensor(id)).collect(), terms) {
                Ok(tickets) => tickets,
                Err(InferError::Overloaded { .. } | InferError::DeadlineExceeded | InferError::NotReady) => continue,
                // a quarter of the queue is reserved for requests without a priority
                Err(InferError::TooManyImages { limit, .. }) if arrival.priority > 0 => {
                    assert!(limit < arrival.images);
                    continue;
                }
                Err(other) => panic!("{other}"),
            };
            assert!(depth.get() <= limit, "{} images are admitted, {limit} may be", depth.get());
            let (fault, patience, leaves) = (setting.fault, arrival.patience, arrival.leaves);
            clients.spawn(async move {
                let mut seen = Seen::default();
                let client = async {
                    for (ticket, id) in tickets.into_iter().zip(ids) {
                        wait(ticket, id, fault, patience, &mut seen).await;
                    }
                };
                match leaves {
                    Some(after) => drop(tokio::time::timeout(after, client).await),
                    None => client.await,
                }
                seen
            });
        }
        while let Some(client) = clients.join_next().await {
            let of_client = client.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
            seen.answered += of_client.answered;
            seen.internal += of_client.internal;
        }
    });
    eventually("every slot is back", || depth.get() == 0);
    assert_eq!(all_images(&metrics, "m"), asked, "every image ends once");
    assert!(images(&metrics, "m", Outcome::Ok) >= seen.answered);
    assert!(images(&metrics, "m", Outcome::Internal) >= seen.internal);
    // and the engine works again
    *strings.fault.lock().unwrap() = None;
    eventually("all engines are back", || scheduler.health().engines == setting.options.workers);
    let ticket = scheduler.submit(vec![tensor(7.0)], Instant::now() + PATIENT).unwrap().remove(0);
    assert_eq!(runtime.block_on(ticket.answer()).unwrap().logits[0], 7.0);
    scheduler.close();
    assert_eq!(scheduler.join(Instant::now() + PATIENT), 0, "every thread ends");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_image_ends_once_and_with_its_own_answer(setting in setting(), arrivals in prop::collection::vec(arrival(), 30..90)) {
        play(&setting, &arrivals);
    }
}
