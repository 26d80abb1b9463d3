//! The scheduler with engines that are slow, hang, fail, panic or return wrong results: every image gets its own answer
//! or a refusal, exactly once, and nothing is queued without bound.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nfold::infer::error::InferError;
use nfold::infer::job::{Golden, Invariance, Job, OpenBackend, SchedulerOptions, StartError};
use nfold::infer::request::{Input, Output, Terms, Ticket};
use nfold::infer::scheduler::Scheduler;
use nfold::infer::system::Os;
use nfold::metrics::{Metrics, Outcome};
use nfold::pixels::Preprocessor;

use crate::fakes::{CLASSES, Fault, MARK, SIDE, Strings, all_images, eventually, images, model_dir, opener, options};

const SOON: Duration = Duration::from_secs(10);

struct Stage {
    scheduler: Scheduler,
    strings: Arc<Strings>,
    metrics: Metrics,
}

fn start(options: SchedulerOptions) -> Stage {
    let (strings, metrics) = (Arc::new(Strings::default()), Metrics::new());
    let scheduler = Scheduler::start(job(&strings, &metrics), options).unwrap();
    strings.forget_warm_up();
    Stage { scheduler, strings, metrics }
}

fn job(strings: &Arc<Strings>, metrics: &Metrics) -> Job {
    Job {
        what: "m/1".into(),
        preprocessor: Preprocessor::new(&model_dir("m", 1).manifest.preprocessing),
        exif_orientation: false,
        classes: CLASSES,
        open: opener(strings),
        open_wide: None,
        golden: None,
        metrics: metrics.model("m", 1, "fake"),
        system: Arc::new(Os),
    }
}

fn tensor(id: f32) -> Input {
    let mut values = vec![0.0; 3 * SIDE * SIDE];
    values[0] = id;
    Input::Tensor(values)
}

impl Stage {
    fn submit(&self, id: f32) -> Result<Ticket, InferError> {
        self.submit_until(id, Instant::now() + SOON)
    }

    fn submit_until(&self, id: f32, deadline: Instant) -> Result<Ticket, InferError> {
        Ok(self.scheduler.submit(vec![tensor(id)], deadline)?.remove(0))
    }

    fn depth(&self) -> i64 {
        self.metrics.queue_depth.with_label_values(&["m", "1"]).get()
    }

    /// One image inside the (held) engine; everything after it waits.
    fn occupy(&self) -> Ticket {
        self.strings.hold();
        let before = self.strings.runs();
        let ticket = self.submit(0.0).unwrap();
        eventually("the engine is busy", || self.strings.runs() == before + 1);
        ticket
    }

    fn ended(&self, outcome: Outcome) -> u64 {
        images(&self.metrics, "m", outcome)
    }
}

fn wait<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

fn answer(ticket: Ticket) -> Result<Output, InferError> {
    wait(ticket.answer())
}

#[test]
fn every_reply_belongs_to_its_request_and_the_queue_is_bounded() {
    const LIMIT: usize = 16;
    for decoders in [0, 2] {
        let stage = start(SchedulerOptions { decoders, ..options(3, 4, LIMIT) });
        *stage.strings.delay.lock().unwrap() = Duration::from_micros(300);
        let (answered, refused, most) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for client in 0..8_usize {
                let (stage, answered, refused, most) = (&stage, &answered, &refused, &most);
                scope.spawn(move || {
                    for turn in 0..250 {
                        let count = 1 + (client + turn) % 4;
                        let ids: Vec<f32> = (0..count).map(|i| (client * 10_000 + turn * 10 + i) as f32).collect();
                        let inputs = ids.iter().map(|&id| tensor(id)).collect();
                        match stage.scheduler.submit(inputs, Instant::now() + SOON) {
                            Ok(tickets) => {
                                most.fetch_max(usize::try_from(stage.depth()).unwrap(), Ordering::SeqCst);
                                for (ticket, id) in tickets.into_iter().zip(ids) {
                                    let output = answer(ticket).unwrap();
                                    assert_eq!(output.logits, [id, 0.0, 0.0]);
                                    assert!(output.timings.batch <= 4);
                                    answered.fetch_add(1, Ordering::SeqCst);
                                }
                            }
                            Err(InferError::Overloaded { .. }) => {
                                refused.fetch_add(count, Ordering::SeqCst);
                            }
                            Err(other) => panic!("{other}"),
                        }
                    }
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= LIMIT);
        assert_eq!(stage.depth(), 0, "every slot is back");
        assert_eq!(stage.ended(Outcome::Ok), answered.load(Ordering::SeqCst) as u64);
        assert_eq!(stage.ended(Outcome::Overloaded), refused.load(Ordering::SeqCst) as u64);
        assert_eq!(all_images(&stage.metrics, "m"), (answered.into_inner() + refused.into_inner()) as u64);
    }
}

#[test]
fn a_full_queue_refuses_at_once_and_whole_requests() {
    let stage = start(options(1, 4, 3));
    let busy = stage.occupy();
    let waiting = stage.submit(1.0).unwrap();
    let started = Instant::now();
    let two = stage.scheduler.submit(vec![tensor(2.0), tensor(3.0)], Instant::now() + SOON);
    assert!(matches!(two, Err(InferError::Overloaded { retry_after }) if retry_after > Duration::ZERO), "{two:?}");
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(stage.depth(), 2, "a refused request takes no slot");
    let last = stage.submit(4.0).unwrap();
    assert!(matches!(stage.submit(5.0), Err(InferError::Overloaded { .. })));
    let many = stage.scheduler.submit((0..4).map(|i| tensor(i as f32)).collect(), Instant::now() + SOON);
    assert!(matches!(many, Err(InferError::TooManyImages { images: 4, limit: 3 })), "{many:?}");
    stage.strings.release();
    for ticket in [busy, waiting, last] {
        answer(ticket).unwrap();
    }
    assert_eq!(stage.depth(), 0);
    assert!(!stage.strings.seen.lock().unwrap().contains(&2), "nothing refused is computed");
}

#[test]
fn batches_form_from_what_waits_in_order() {
    let stage = start(options(1, 4, 100));
    let busy = stage.occupy();
    let tickets: Vec<Ticket> = (1..=6).map(|i| stage.submit(i as f32).unwrap()).collect();
    stage.strings.release();
    answer(busy).unwrap();
    let batches: Vec<usize> = tickets.into_iter().map(|t| answer(t).unwrap().timings.batch).collect();
    assert_eq!(batches, [4, 4, 4, 4, 2, 2]);
    assert_eq!(*stage.strings.batches.lock().unwrap(), [1, 4, 2]);
}

#[test]
fn a_burst_on_idle_engines_is_shared_out() {
    let stage = start(options(2, 8, 100));
    stage.strings.hold();
    let tickets = stage.scheduler.submit((0..4).map(|i| tensor(i as f32)).collect(), Instant::now() + SOON).unwrap();
    eventually("both engines have work", || stage.strings.runs() == 2);
    stage.strings.release();
    let batches: Vec<usize> = tickets.into_iter().map(|t| answer(t).unwrap().timings.batch).collect();
    assert!(batches.iter().all(|&b| b <= 3), "{batches:?}");
}

#[test]
fn a_queue_delay_fills_batches_and_ends() {
    let stage = start(SchedulerOptions { max_queue_delay: Duration::from_millis(200), ..options(1, 3, 100) });
    let started = Instant::now();
    let full: Vec<Ticket> = (0..3).map(|i| stage.submit(i as f32).unwrap()).collect();
    for ticket in full {
        assert_eq!(answer(ticket).unwrap().timings.batch, 3);
    }
    assert!(started.elapsed() < Duration::from_millis(150), "a full batch waits for nobody");
    let alone = answer(stage.submit(9.0).unwrap()).unwrap();
    assert!(alone.timings.queue >= Duration::from_millis(190), "{:?}", alone.timings);
    assert_eq!(alone.timings.batch, 1);
}

#[test]
fn expired_images_are_not_computed() {
    let stage = start(options(1, 4, 100));
    let busy = stage.occupy();
    let late = stage.submit_until(7.0, Instant::now() + Duration::from_millis(30)).unwrap();
    let started = Instant::now();
    assert!(matches!(answer(late), Err(InferError::DeadlineExceeded)));
    assert!(started.elapsed() < Duration::from_secs(5), "the caller hears at its deadline, not when an engine is free");
    assert!(matches!(stage.submit_until(8.0, Instant::now()), Err(InferError::DeadlineExceeded)));
    stage.strings.release();
    answer(busy).unwrap();
    eventually("the slot is back", || stage.depth() == 0);
    assert!(stage.strings.seen.lock().unwrap().is_disjoint(&[7, 8].into()));
    assert_eq!(stage.ended(Outcome::DeadlineExceeded), 2);
}

#[test]
fn cancelled_images_are_not_computed_and_make_room() {
    let stage = start(options(1, 4, 3));
    let busy = stage.occupy();
    let gone = [stage.submit(7.0).unwrap(), stage.submit(8.0).unwrap()];
    drop(gone);
    let next = stage.submit(9.0).expect("expired images make room");
    stage.strings.release();
    answer(busy).unwrap();
    assert_eq!(answer(next).unwrap().logits[0], 9.0);
    assert!(stage.strings.seen.lock().unwrap().is_disjoint(&[7, 8].into()));
    assert_eq!(stage.ended(Outcome::Cancelled), 2);
    assert_eq!(stage.depth(), 0);
}

#[test]
fn decoders_go_on_when_all_that_they_decoded_is_cancelled() {
    let stage = start(SchedulerOptions { decoders: 1, ..options(1, 1, 100) });
    let busy = stage.occupy();
    let gone = [stage.submit(7.0).unwrap(), stage.submit(8.0).unwrap()];
    let next = stage.submit(9.0).unwrap();
    // two decoded images feed one engine: the decoder rests, the third stays as it came
    std::thread::sleep(Duration::from_millis(20));
    drop(gone);
    stage.strings.release();
    answer(busy).unwrap();
    assert_eq!(answer(next).unwrap().logits[0], 9.0);
}

#[test]
fn hopeless_deadlines_are_refused_at_the_door() {
    let stage = start(options(1, 1, 100));
    *stage.strings.delay.lock().unwrap() = Duration::from_millis(20);
    for i in 0..20 {
        answer(stage.submit(i as f32).unwrap()).unwrap();
    }
    let busy = stage.occupy();
    let waiting: Vec<Ticket> = (0..20).map(|i| stage.submit(i as f32).unwrap()).collect();
    let hopeless = stage.submit_until(5.0, Instant::now() + Duration::from_millis(40));
    assert!(matches!(hopeless, Err(InferError::Overloaded { .. })), "{hopeless:?}");
    stage.strings.release();
    answer(busy).unwrap();
    waiting.into_iter().for_each(|t| drop(answer(t).unwrap()));
}

fn poison(fault: Fault) {
    let stage = start(options(1, 8, 100));
    *stage.strings.fault.lock().unwrap() = Some(fault);
    let busy = stage.occupy();
    let good: Vec<Ticket> = [1.0, 2.0].map(|i| stage.submit(i).unwrap()).into();
    let bad = stage.submit(MARK).unwrap();
    let more = stage.submit(3.0).unwrap();
    stage.strings.release();
    answer(busy).unwrap();
    for (ticket, id) in good.into_iter().chain([more]).zip([1.0, 2.0, 3.0]) {
        assert_eq!(answer(ticket).unwrap().logits[0], id);
    }
    assert!(matches!(answer(bad), Err(InferError::Internal(detail)) if detail.contains("told to")));
    assert_eq!(stage.depth(), 0);
    assert_eq!((stage.ended(Outcome::Ok), stage.ended(Outcome::Internal)), (4, 1));
    answer(stage.submit(4.0).unwrap()).expect("the engine lives on");
    assert_eq!(stage.scheduler.health().failures, 0);
}

#[test]
fn a_failing_image_does_not_poison_its_batch() {
    poison(Fault::Error);
}

#[test]
fn a_panicking_image_does_not_poison_its_batch_and_the_engine_is_replaced() {
    poison(Fault::Panic);
}

#[test]
fn a_panicking_engine_is_reopened_and_counted() {
    let stage = start(options(1, 1, 100));
    *stage.strings.fault.lock().unwrap() = Some(Fault::Panic);
    assert!(answer(stage.submit(MARK).unwrap()).is_err());
    eventually("it is reopened", || stage.strings.opens.load(Ordering::SeqCst) == 2);
    eventually("it works", || stage.scheduler.health().engines == 1);
    answer(stage.submit(1.0).unwrap()).unwrap();
    assert_eq!(stage.metrics.engine_runs_total.with_label_values(&["m", "1", "fake", "panic"]).get(), 1);
}

#[test]
fn without_any_engine_requests_are_refused_until_one_is_back() {
    let stage = start(options(1, 1, 100));
    *stage.strings.fault.lock().unwrap() = Some(Fault::Panic);
    stage.strings.refuse_open.store(true, Ordering::SeqCst);
    assert!(answer(stage.submit(MARK).unwrap()).is_err());
    eventually("the engine is gone", || stage.scheduler.health().engines == 0);
    assert!(matches!(stage.submit(1.0), Err(InferError::NotReady)));
    stage.strings.refuse_open.store(false, Ordering::SeqCst);
    eventually("the engine is back", || stage.scheduler.health().engines == 1);
    answer(stage.submit(1.0).unwrap()).unwrap();
}

#[test]
fn logits_of_the_wrong_shape_are_a_fault() {
    let stage = start(options(1, 4, 100));
    *stage.strings.fault.lock().unwrap() = Some(Fault::Short);
    assert!(matches!(answer(stage.submit(1.0).unwrap()), Err(InferError::Internal(_))));
    assert_eq!(stage.scheduler.health().failures, 1);
}

#[test]
fn a_hung_run_shows() {
    let stage = start(options(1, 4, 100));
    let busy = stage.occupy();
    std::thread::sleep(Duration::from_millis(30));
    assert!(stage.scheduler.health().longest_run.is_some_and(|age| age >= Duration::from_millis(30)));
    stage.strings.release();
    answer(busy).unwrap();
    eventually("no run", || stage.scheduler.health().longest_run.is_none());
}

#[test]
fn closing_answers_what_is_queued_and_refuses_the_rest() {
    let stage = start(options(2, 2, 100));
    stage.strings.hold();
    let tickets: Vec<Ticket> = (0..9).map(|i| stage.submit(i as f32).unwrap()).collect();
    stage.scheduler.close();
    assert!(matches!(stage.submit(10.0), Err(InferError::ShuttingDown)));
    assert_eq!(stage.scheduler.join(Instant::now() + Duration::from_millis(20)), 2, "they still have work");
    stage.strings.release();
    for (i, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(answer(ticket).unwrap().logits[0], i as f32);
    }
    assert_eq!(stage.scheduler.join(Instant::now() + SOON), 0);
    assert_eq!(stage.depth(), 0);
}

#[test]
fn aborting_answers_at_once() {
    let stage = start(options(1, 2, 100));
    let busy = stage.occupy();
    let tickets: Vec<Ticket> = (0..5).map(|i| stage.submit(i as f32).unwrap()).collect();
    stage.scheduler.abort();
    for ticket in tickets {
        assert!(matches!(answer(ticket), Err(InferError::ShuttingDown)));
    }
    stage.strings.release();
    answer(busy).unwrap();
    assert_eq!(stage.scheduler.join(Instant::now() + SOON), 0);
}

#[test]
fn a_model_that_fails_its_warm_up_does_not_start() {
    let (strings, metrics) = (Arc::new(Strings::default()), Metrics::new());
    *strings.fault.lock().unwrap() = Some(Fault::Short);
    let started = Scheduler::start(job(&strings, &metrics), options(2, 2, 10));
    assert!(matches!(started, Err(StartError::WarmUp { batch: 1, .. })), "{started:?}");
}

#[test]
fn warm_up_runs_every_batch_size() {
    let (strings, metrics) = (Arc::new(Strings::default()), Metrics::new());
    let _scheduler = Scheduler::start(job(&strings, &metrics), options(1, 20, 10)).unwrap();
    let mut sizes = strings.batches.lock().unwrap().clone();
    sizes.sort_unstable();
    sizes.dedup();
    assert_eq!(sizes, (1..=20).collect::<Vec<_>>());
}

/// A scheduler that is ready at one image, and whose engines wait at `count` images and more until they are released.
fn ready_at_one(options: SchedulerOptions, count: usize) -> Stage {
    let (strings, metrics) = (Arc::new(Strings::default()), Metrics::new());
    strings.hold_from(count);
    let options = SchedulerOptions { ready_at_one: true, ..options };
    let scheduler = Scheduler::start(job(&strings, &metrics), options).unwrap();
    Stage { scheduler, strings, metrics }
}

#[test]
fn single_images_are_answered_before_batches_are_warm() {
    let stage = ready_at_one(options(2, 4, 16), 2);
    eventually("a batch is tried", || stage.strings.batches.lock().unwrap().contains(&2));
    // the first worker waits in the test, the other in the largest batch; nothing can run a batch
    stage.strings.hold_from(3);
    eventually("the sizes are tried", || {
        let batches = stage.strings.batches.lock().unwrap();
        batches.contains(&3) && batches.contains(&4)
    });
    let waiting = [stage.submit(7.0).unwrap(), stage.submit(8.0).unwrap()];
    assert!(stage.metrics.invariance_max_abs_diff.with_label_values(&["m", "1"]).get().is_nan(), "not known yet");
    stage.strings.release();
    for (ticket, id) in waiting.into_iter().zip([7.0, 8.0]) {
        assert_eq!(answer(ticket).unwrap().logits, [id, 0.0, 0.0]);
    }
    let difference = || stage.metrics.invariance_max_abs_diff.with_label_values(&["m", "1"]).get();
    eventually("all is warm", || difference() == 0.0 && stage.scheduler.health().longest_run.is_none());
    stage.strings.forget_warm_up();
    let busy = [stage.occupy(), stage.submit(1.0).unwrap()];
    eventually("both engines are busy", || stage.strings.runs() == 2);
    let waiting: Vec<Ticket> = (2..10).map(|id| stage.submit(id as f32).unwrap()).collect();
    stage.strings.release();
    waiting.into_iter().chain(busy).for_each(|ticket| drop(answer(ticket).unwrap()));
    assert_eq!(stage.strings.batches.lock().unwrap().iter().max(), Some(&4));
}

#[test]
fn a_worker_that_always_has_work_gets_warm_and_runs_no_larger_batch_before() {
    // its first run of two images waits
    let stage = ready_at_one(options(1, 4, 64), 2);
    eventually("a batch is tried", || stage.strings.batches.lock().unwrap().contains(&2));
    let waiting: Vec<Ticket> = (1..=40).map(|id| stage.submit(id as f32).unwrap()).collect();
    stage.strings.forget_warm_up();
    stage.strings.release();
    let answers: Vec<Output> = waiting.into_iter().map(|ticket| answer(ticket).unwrap()).collect();
    assert!(answers.iter().enumerate().all(|(at, output)| output.logits[0] == at as f32 + 1.0));
    let batches = stage.strings.batches.lock().unwrap().clone();
    // images two by two once two are warm, then the test of three, and so on
    assert_eq!(batches[..5], [2, 3, 3, 4, 4], "{batches:?}");
}

#[test]
fn what_fails_in_a_later_warm_up_stays_closed() {
    let (strings, metrics) = (Arc::new(Strings::default()), Metrics::new());
    *strings.fault.lock().unwrap() = Some(Fault::ErrorFrom(3));
    let options = SchedulerOptions { ready_at_one: true, ..options(1, 4, 64) };
    let scheduler = Scheduler::start(job(&strings, &metrics), options).unwrap();
    let stage = Stage { scheduler, strings, metrics };
    eventually("three are tried", || stage.strings.batches.lock().unwrap().contains(&3));
    stage.strings.forget_warm_up();
    let busy = stage.occupy();
    let waiting: Vec<Ticket> = (1..=9).map(|id| stage.submit(id as f32).unwrap()).collect();
    stage.strings.release();
    waiting.into_iter().chain([busy]).for_each(|ticket| drop(answer(ticket).unwrap()));
    assert_eq!(*stage.strings.batches.lock().unwrap(), [1, 2, 2, 2, 2, 1]);
    // where all is tested first, it does not start
    let refused = |options: SchedulerOptions| {
        let started = Scheduler::start(job(&stage.strings, &Metrics::new()), options);
        matches!(started, Err(StartError::WarmUp { batch: 3, .. }))
    };
    let options = || SchedulerOptions { ready_at_one: true, ..self::options(1, 4, 64) };
    assert!(refused(SchedulerOptions { invariance: Invariance::Require, ..options() }));
    assert!(refused(SchedulerOptions { one_by_one: true, ..options() }));
    assert!(refused(SchedulerOptions { ready_at_one: false, ..options() }));
}

#[test]
fn a_server_stops_in_the_middle_of_its_warm_up() {
    let stage = ready_at_one(options(2, 8, 16), 2);
    eventually("a batch is tried", || stage.strings.batches.lock().unwrap().contains(&2));
    stage.scheduler.close();
    stage.strings.release();
    assert_eq!(stage.scheduler.join(Instant::now() + SOON), 0);
    assert!(!stage.strings.batches.lock().unwrap().contains(&3), "it goes on with it");
}

/// Engines of all workers are told apart by the order in which they are opened.
#[test]
fn a_size_that_fails_on_one_of_two_engines_stays_closed_for_both() {
    let [whole, broken] = [Arc::new(Strings::default()), Arc::new(Strings::default())];
    *broken.fault.lock().unwrap() = Some(Fault::ErrorFrom(4));
    let (metrics, opened) = (Metrics::new(), AtomicUsize::new(0));
    let openers = [opener(&whole), opener(&broken)];
    let open: OpenBackend = Box::new(move || openers[opened.fetch_add(1, Ordering::SeqCst).min(1)]());
    let job = Job { open, ..job(&whole, &metrics) };
    let options = SchedulerOptions { ready_at_one: true, invariance: Invariance::Off, ..options(2, 4, 64) };
    let scheduler = Scheduler::start(job, options).unwrap();
    let tried = |strings: &Strings| strings.batches.lock().unwrap().contains(&4);
    eventually("the largest batch is tried by both", || tried(&whole) && tried(&broken));
    eventually("none runs", || scheduler.health().longest_run.is_none());
    [&whole, &broken].iter().for_each(|strings| strings.forget_warm_up());
    [&whole, &broken].iter().for_each(|strings| strings.hold());
    let stage = Stage { scheduler, strings: whole, metrics };
    let waiting: Vec<Ticket> = (1..=24).map(|id| stage.submit(id as f32).unwrap()).collect();
    stage.strings.release();
    broken.release();
    waiting.into_iter().for_each(|ticket| drop(answer(ticket).unwrap()));
    let largest = [&stage.strings, &broken].map(|strings| strings.batches.lock().unwrap().iter().copied().max());
    assert!(largest.iter().flatten().all(|&images| images <= 3), "{largest:?}");
}

#[test]
fn a_stop_with_images_waiting_warms_up_no_further() {
    let stage = ready_at_one(options(1, 8, 64), 2);
    eventually("a batch is tried", || stage.strings.batches.lock().unwrap().contains(&2));
    let waiting: Vec<Ticket> = (1..=9).map(|id| stage.submit(id as f32).unwrap()).collect();
    stage.scheduler.close();
    stage.strings.forget_warm_up();
    stage.strings.release();
    waiting.into_iter().for_each(|ticket| drop(answer(ticket).unwrap()));
    assert_eq!(stage.scheduler.join(Instant::now() + SOON), 0);
    let batches = stage.strings.batches.lock().unwrap().clone();
    assert!(batches.iter().all(|&images| images <= 2) && batches.iter().sum::<usize>() == 9, "{batches:?}");
}

/// A stage with a wide engine, for an idle machine.
fn elastic(options: SchedulerOptions) -> (Stage, Arc<Strings>) {
    let (strings, wide, metrics) = (Arc::new(Strings::default()), Arc::new(Strings::default()), Metrics::new());
    let job = Job { open_wide: Some(opener(&wide)), ..job(&strings, &metrics) };
    let scheduler = Scheduler::start(job, options).unwrap();
    strings.forget_warm_up();
    wide.forget_warm_up();
    (Stage { scheduler, strings, metrics }, wide)
}

#[test]
fn an_idle_machine_gives_an_image_all_cores_and_a_busy_one_does_not() {
    let (stage, wide) = elastic(options(2, 4, 100));
    for id in 0..3 {
        assert_eq!(answer(stage.submit(id as f32).unwrap()).unwrap().logits[0], id as f32);
    }
    assert_eq!((wide.runs(), stage.strings.runs()), (3, 0));
    // the wide engine is busy: the next image runs on one core
    wide.hold();
    let first = stage.submit(10.0).unwrap();
    eventually("the wide engine has it", || wide.runs() == 4);
    assert_eq!(answer(stage.submit(11.0).unwrap()).unwrap().logits[0], 11.0);
    assert_eq!(stage.strings.runs(), 1);
    wide.release();
    answer(first).unwrap();
    // several images at once share the cores
    stage.strings.hold();
    let both = stage.scheduler.submit(vec![tensor(20.0), tensor(21.0)], Instant::now() + SOON).unwrap();
    eventually("each has a core", || stage.strings.runs() == 3 || wide.runs() == 5);
    stage.strings.release();
    for ticket in both {
        answer(ticket).unwrap();
    }
    assert_eq!(all_images(&stage.metrics, "m"), stage.ended(Outcome::Ok));
}

/// The wide engine is fast because the machine is idle: its cost must not count as that of a busy machine.
#[test]
fn an_idle_machine_does_not_spoil_the_estimate() {
    let (stage, wide) = elastic(options(1, 1, 100));
    *stage.strings.delay.lock().unwrap() = Duration::from_millis(40);
    wide.hold();
    let first = stage.submit(0.0).unwrap();
    eventually("the wide engine has it", || wide.runs() == 1);
    let mut crowd: Vec<Ticket> = (1..30).map(|i| stage.submit(i as f32).unwrap()).collect();
    wide.release();
    crowd.insert(0, first);
    crowd.into_iter().for_each(|ticket| drop(answer(ticket).unwrap()));
    // now it is idle for a while, and answers at once
    for i in 0..50 {
        answer(stage.submit(i as f32).unwrap()).unwrap();
    }
    let before = wide.runs();
    assert!(before > 40, "{before}");
    wide.hold();
    let first = stage.submit(0.0).unwrap();
    eventually("the wide engine has it", || wide.runs() == before + 1);
    let crowd: Vec<Ticket> = (1..20).map(|i| stage.submit(i as f32).unwrap()).collect();
    let hopeless = stage.submit_until(5.0, Instant::now() + Duration::from_millis(300));
    assert!(matches!(hopeless, Err(InferError::Overloaded { .. })), "twenty before it take 40 ms each: {hopeless:?}");
    wide.release();
    for ticket in crowd.into_iter().chain([first]) {
        answer(ticket).unwrap();
    }
}

#[test]
fn what_the_wide_engine_fails_at_a_core_answers() {
    for fault in [Fault::Error, Fault::Panic, Fault::Short] {
        let (stage, wide) = elastic(options(1, 4, 100));
        *wide.fault.lock().unwrap() = Some(fault);
        assert_eq!(answer(stage.submit(MARK).unwrap()).unwrap().logits[0], MARK, "{fault:?}");
        *wide.fault.lock().unwrap() = None;
        assert_eq!(answer(stage.submit(2.0).unwrap()).unwrap().logits[0], 2.0);
        assert_eq!(wide.runs(), 2, "it is back after {fault:?}");
        assert_eq!((stage.ended(Outcome::Ok), stage.depth()), (2, 0));
    }
}

#[test]
fn priority_goes_before_arrival() {
    let stage = start(options(1, 1, 100));
    let busy = stage.occupy();
    let submit = |id: f32, priority| {
        let terms = Terms { deadline: Instant::now() + SOON, priority };
        stage.scheduler.submit(vec![tensor(id)], terms).unwrap().remove(0)
    };
    // unnamed, last, first, unnamed, first: by priority, then by arrival
    let tickets = [(1.0, 0), (2.0, 4_000_000), (3.0, 1), (4.0, 0), (5.0, 1)].map(|(id, p)| submit(id, p));
    stage.strings.release();
    for ticket in tickets.into_iter().chain([busy]) {
        answer(ticket).unwrap();
    }
    assert_eq!(*stage.strings.order.lock().unwrap(), [0, 3, 5, 1, 4, 2]);
}

#[test]
fn batches_are_padded_to_buckets_and_the_padding_counted() {
    let stage = start(SchedulerOptions { buckets: vec![4, 1], ..options(1, 8, 100) });
    let busy = stage.occupy();
    let tickets: Vec<Ticket> = (1..=3).map(|i| stage.submit(i as f32).unwrap()).collect();
    stage.strings.release();
    answer(busy).unwrap();
    let answers: Vec<Output> = tickets.into_iter().map(|t| answer(t).unwrap()).collect();
    assert_eq!(answers.iter().map(|o| o.logits[0] as i64).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(answers.iter().all(|o| o.logits.len() == CLASSES && o.timings.batch == 3));
    let runs = stage.strings.batches.lock().unwrap().clone();
    assert_eq!(runs, [1, 4], "no other shape reaches the engine");
    assert!(stage.metrics.padding_images_total.with_label_values(&["m", "1"]).get() >= 1);
    assert!(stage.scheduler.options().max_batch == 4, "no batch is larger than the largest bucket");
}

#[test]
fn answers_that_depend_on_their_batch_are_found_at_the_start() {
    let begin = |invariance| {
        let (strings, metrics) = (Arc::new(Strings::default()), Metrics::new());
        *strings.fault.lock().unwrap() = Some(Fault::Batched);
        let started = Scheduler::start(job(&strings, &metrics), SchedulerOptions { invariance, ..options(2, 4, 10) });
        (started.map(drop), metrics.invariance_max_abs_diff.with_label_values(&["m", "1"]).get())
    };
    let (refused, _) = begin(Invariance::Require);
    assert!(matches!(refused, Err(StartError::Variant { difference: 3.0 })), "{refused:?}");
    let (started, measured) = begin(Invariance::Report);
    assert!(started.is_ok() && measured == 3.0, "{measured}");
    let (started, measured) = begin(Invariance::Off);
    assert!(started.is_ok() && measured.is_nan(), "{measured}");
}

#[test]
fn a_model_that_forgot_its_golden_answer_does_not_start() {
    let begin = |first: f32, tolerance| {
        let (strings, metrics) = (Arc::new(Strings::default()), Metrics::new());
        let mut input = vec![0.0; 3 * SIDE * SIDE];
        (input[0], input[1]) = (7.0, 8.0);
        let golden = Golden { input, logits: vec![first, 8.0, 0.0], tolerance };
        let job = Job { golden: Some(golden), ..job(&strings, &metrics) };
        Scheduler::start(job, options(1, 1, 10)).map(drop)
    };
    begin(7.0, 0.0).unwrap();
    begin(7.4, 0.5).unwrap();
    assert!(matches!(begin(7.5, 0.4), Err(StartError::Golden { difference: 0.5, .. })));
    assert!(matches!(begin(f32::NAN, 0.4), Err(StartError::Golden { .. })));
}

/// A million images of priority 1 can't starve one without a priority.
#[test]
fn a_flood_of_first_priority_leaves_the_others_their_share() {
    let stage = start(options(1, 1, 200));
    let busy = stage.occupy();
    let submit = |id: f32, priority| {
        let terms = Terms { deadline: Instant::now() + SOON, priority };
        stage.scheduler.submit(vec![tensor(id)], terms).map(|mut tickets| tickets.remove(0))
    };
    let mut tickets: Vec<Ticket> = (0..10).map(|i| submit(1000.0 + i as f32, 0).unwrap()).collect();
    tickets.push(submit(5000.0, 4_000_000).unwrap());
    let flood: Vec<Ticket> = std::iter::from_fn(|| submit(1.0, 1).ok()).collect();
    assert_eq!(flood.len(), 149, "three quarters of the queue, less the one after the default");
    let refused = submit(1.0, 1);
    assert!(matches!(refused, Err(InferError::Overloaded { .. })), "{refused:?}");
    tickets.extend((10..49).map(|i| submit(1000.0 + i as f32, 0).expect("the rest is for these")));
    assert!(submit(0.0, 0).is_err(), "it is full now");
    stage.strings.release();
    for ticket in tickets.into_iter().chain(flood).chain([busy]) {
        answer(ticket).unwrap();
    }
    let order = stage.strings.order.lock().unwrap().clone();
    let of = |from: i64| {
        order.iter().enumerate().filter(|(_, id)| **id >= from && **id < 4 * from).map(|(i, _)| i).collect::<Vec<_>>()
    };
    let (defaults, last) = (of(1000), of(5000));
    assert_eq!(defaults.len(), 49);
    assert!(defaults.windows(2).all(|pair| pair[1] - pair[0] <= 4), "{defaults:?}");
    assert!(last[0] <= 17, "{last:?}");
    let ids: Vec<i64> = defaults.iter().map(|&i| order[i]).collect();
    assert!(ids.is_sorted(), "first come, first served within a class: {ids:?}");
}
