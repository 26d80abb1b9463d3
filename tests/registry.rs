//! Models that are loaded and unloaded while others serve: failures are reported, and affect only their model.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nfold::infer::error::InferError;
use nfold::infer::job::OpenBackend;
use nfold::infer::registry::{Engines, LiveModel, LoadError, Look, Registry, RegistryError, Source};
use nfold::infer::request::Input;
use nfold::infer::system::Os;
use nfold::metrics::Metrics;
use nfold::model::{LeftOut, Listing, ModelDir, ModelError};

use crate::fakes::{SIDE, Strings, model_dir, opener, options};

/// How a version opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opens {
    Well,
    /// The engine panics when it is opened.
    PanicInThread,
    /// The engine panics in its first run.
    PanicInRun,
    /// Reading the graph panics.
    PanicBefore,
}

/// A repository in memory: versions of one model, each with how it opens and its fingerprint.
#[derive(Debug, Default)]
struct Shelf {
    versions: Mutex<BTreeMap<u64, (Opens, &'static str)>>,
    left_out: Mutex<Vec<LeftOut>>,
    opened: AtomicUsize,
}

#[derive(Debug)]
struct Shelves(Arc<Shelf>);

impl Source for Shelves {
    fn list(&self) -> Result<Listing, ModelError> {
        let versions: Vec<u64> = self.0.versions.lock().unwrap().keys().copied().collect();
        let models = if versions.is_empty() { BTreeMap::new() } else { BTreeMap::from([("m".to_string(), versions)]) };
        Ok(Listing { models, left_out: self.0.left_out.lock().unwrap().clone() })
    }

    fn read(&self, name: &str, version: u64) -> Result<ModelDir, ModelError> {
        let mut dir = model_dir(name, version);
        dir.manifest.source_sha256 = self.fingerprint(name, version);
        Ok(dir)
    }

    fn fingerprint(&self, _: &str, version: u64) -> String {
        self.0.versions.lock().unwrap().get(&version).map_or("gone", |(_, files)| files).into()
    }

    fn open(&self, dir: &ModelDir, metrics: &Metrics) -> Result<LiveModel, LoadError> {
        self.0.opened.fetch_add(1, Ordering::SeqCst);
        let opens = self.0.versions.lock().unwrap()[&dir.version].0;
        assert!(opens != Opens::PanicBefore, "told to panic before");
        let strings = Arc::new(Strings::default());
        if opens == Opens::PanicInRun {
            *strings.fault.lock().unwrap() = Some(crate::fakes::Fault::PanicAlways);
        }
        let well = opener(&strings);
        let open: OpenBackend = Box::new(move || {
            assert!(opens != Opens::PanicInThread, "told to panic in a thread");
            well()
        });
        let engines = Engines { open, open_wide: None, provider: "fake", reduced: false };
        // one by one, as a server reloads
        let options = nfold::infer::job::SchedulerOptions { one_by_one: true, ..options(2, 2, 8) };
        LiveModel::start(dir, engines, &options, metrics)
    }
}

fn registry() -> (Arc<Shelf>, Arc<Registry>, Arc<Metrics>) {
    let shelf = Arc::new(Shelf::default());
    shelf.versions.lock().unwrap().insert(1, (Opens::Well, "a"));
    let registry = Registry::of(Box::new(Shelves(shelf.clone())), Arc::new(Os));
    let metrics = Arc::new(Metrics::new());
    registry.reload(&metrics, Look::Asked).unwrap();
    (shelf, Arc::new(registry), metrics)
}

fn newest(registry: &Registry) -> u64 {
    let model = registry.find(Some("m"), None).unwrap();
    let mut values = vec![0.0; 3 * SIDE * SIDE];
    values[0] = 5.0;
    let inputs = vec![Input::Tensor(values)];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let answers = runtime.block_on(model.infer(inputs, deadline, Ok)).unwrap();
    assert_eq!(answers[0].as_ref().unwrap().0[0], 5.0);
    model.version
}

/// Version 0.1 waited forever for the report of a thread that had panicked, and so did every later reload.
#[test]
fn a_panic_while_an_engine_opens_is_a_failure_like_any_other() {
    for opens in [Opens::PanicInThread, Opens::PanicInRun, Opens::PanicBefore] {
        let (shelf, registry, metrics) = registry();
        shelf.versions.lock().unwrap().insert(2, (opens, "a"));
        let (done, is_done) = std::sync::mpsc::channel();
        let (reloading, counted) = (registry.clone(), metrics.clone());
        std::thread::spawn(move || {
            for _ in 0..3 {
                done.send(reloading.reload(&counted, Look::Asked)).unwrap();
            }
        });
        for _ in 0..3 {
            is_done.recv_timeout(Duration::from_secs(20)).expect("the reload ends").unwrap();
            assert_eq!(newest(&registry), 1, "{opens:?}");
        }
        assert_eq!(metrics.model_reloads_total.with_label_values(&["m", "error"]).get(), 3);
        assert_eq!(metrics.models_skipped.get(), 1);
        let told = registry.load("m", &metrics).unwrap_err().to_string();
        assert!(told.contains("told to panic"), "{told}");
        shelf.versions.lock().unwrap().insert(3, (Opens::Well, "a"));
        registry.reload(&metrics, Look::Asked).unwrap();
        assert_eq!(newest(&registry), 3, "{opens:?}");
    }
}

#[test]
fn what_has_not_changed_is_not_tried_again_at_every_look() {
    let (shelf, registry, metrics) = registry();
    shelf.versions.lock().unwrap().insert(2, (Opens::PanicBefore, "a"));
    let tried = |look| {
        let before = shelf.opened.load(Ordering::SeqCst);
        registry.reload(&metrics, look).unwrap();
        shelf.opened.load(Ordering::SeqCst) - before
    };
    assert_eq!([Look::Again; 4].map(tried), [1, 0, 0, 0]);
    assert_eq!(tried(Look::Asked), 1, "somebody asked");
    assert_eq!(tried(Look::Again), 0);
    shelf.versions.lock().unwrap().insert(2, (Opens::PanicBefore, "b"));
    assert_eq!([Look::Again; 2].map(tried), [1, 0], "its files have changed");
    shelf.versions.lock().unwrap().insert(2, (Opens::Well, "c"));
    assert_eq!([Look::Again; 2].map(tried), [1, 0]);
    assert_eq!((newest(&registry), metrics.models_skipped.get()), (2, 0));
}

/// A rollout that removes the old version together with adding a broken one.
#[test]
fn a_version_stays_until_there_is_one_in_its_stead() {
    let (shelf, registry, metrics) = registry();
    let put = |version, opens| {
        let mut versions = shelf.versions.lock().unwrap();
        versions.clear();
        versions.insert(version, (opens, "a"));
    };
    put(2, Opens::PanicBefore);
    registry.reload(&metrics, Look::Asked).unwrap();
    registry.reload(&metrics, Look::Again).unwrap();
    assert_eq!(newest(&registry), 1);
    put(3, Opens::Well);
    registry.reload(&metrics, Look::Asked).unwrap();
    assert_eq!(registry.all().iter().map(|model| model.version).collect::<Vec<_>>(), [3]);
}

#[test]
fn who_loads_or_unloads_by_name_decides_until_the_folder_changes() {
    let (shelf, registry, metrics) = registry();
    shelf.versions.lock().unwrap().insert(2, (Opens::Well, "a"));
    let served = || registry.all().iter().map(|model| model.version).collect::<Vec<_>>();
    let look = || {
        registry.reload(&metrics, Look::Again).unwrap();
        served()
    };
    assert_eq!(look(), [1, 2]);
    registry.unload("m").unwrap();
    assert_eq!((look(), look()), (vec![], vec![]), "unloaded stays unloaded");
    registry.load("m", &metrics).unwrap();
    assert_eq!((served(), look()), (vec![2], vec![2]), "what was loaded is what is served");
    let before = shelf.opened.load(Ordering::SeqCst);
    registry.load("m", &metrics).unwrap();
    assert_eq!(shelf.opened.load(Ordering::SeqCst), before, "it is served as it is there");
    shelf.versions.lock().unwrap().insert(3, (Opens::Well, "a"));
    assert_eq!(look(), [1, 2, 3], "the folder has changed: the repository decides again");
    registry.unload("m").unwrap();
    shelf.versions.lock().unwrap().remove(&1);
    shelf.versions.lock().unwrap().remove(&2);
    assert_eq!(look(), [3]);
    registry.close();
    shelf.versions.lock().unwrap().insert(4, (Opens::Well, "a"));
    assert_eq!(look(), [3], "nothing is added to a server that stops");
    assert!(matches!(registry.load("m", &metrics), Err(RegistryError::ShuttingDown)));
    assert!(matches!(registry.find(Some("m"), Some(4)), Err(InferError::ModelNotFound { .. })));
}
