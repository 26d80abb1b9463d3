//! Declares a struct of metrics: a field is a metric, its doc comment the help text, its type the kind with the names
//! of its labels.

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// The declaration of a metric.
#[derive(Debug, Clone, Copy)]
pub struct Declaration {
    /// Name without the program's prefix.
    pub name: &'static str,
    /// Help text.
    pub help: &'static str,
    /// Names of the labels.
    pub labels: &'static [&'static str],
    /// Upper bounds of a histogram's buckets; absent for the other kinds.
    pub buckets: Option<&'static [f64]>,
}

impl Declaration {
    /// Creates and registers the metric. Can't fail: names and labels are constants, which the tests register once.
    pub(super) fn register<T: Kind>(&self, registry: &Registry) -> T {
        let metric = T::new(self).unwrap_or_else(|error| unreachable!("malformed metric: {error}"));
        register(registry, metric.clone());
        metric
    }

    fn options(&self) -> Opts {
        Opts::new(self.name, self.help).namespace("nfold")
    }
}

/// Registers a collector whose name is unique.
pub(super) fn register(registry: &Registry, collector: impl Collector + 'static) {
    if let Err(error) = registry.register(Box::new(collector)) {
        unreachable!("metric declared twice: {error}");
    }
}

/// A kind of metric, created from its declaration.
pub(super) trait Kind: Collector + Clone + 'static {
    fn new(declaration: &Declaration) -> prometheus::Result<Self>;
}

macro_rules! kinds {
    ($($alone:ident)*; $($labelled:ident)*) => {
        $(impl Kind for $alone {
            fn new(declaration: &Declaration) -> prometheus::Result<Self> {
                Self::with_opts(declaration.options())
            }
        })*
        $(impl Kind for $labelled {
            fn new(declaration: &Declaration) -> prometheus::Result<Self> {
                Self::new(declaration.options(), declaration.labels)
            }
        })*
    };
}

kinds!(IntCounter IntGauge Gauge; IntCounterVec IntGaugeVec GaugeVec);

impl Kind for HistogramVec {
    fn new(declaration: &Declaration) -> prometheus::Result<Self> {
        let buckets = declaration.buckets.unwrap_or_default().to_vec();
        Self::new(HistogramOpts::from(declaration.options()).buckets(buckets), declaration.labels)
    }
}

macro_rules! optional {
    () => {
        None
    };
    ($value:expr) => {
        Some($value)
    };
}

macro_rules! metrics {
    ($(#[$about:meta])+ pub struct $metrics:ident {
        $(#[doc = $help:literal] pub $name:ident: $kind:ident $([$($label:literal),+])? $(in $buckets:expr)?,)+
    }) => {
        $(#[$about])+
        #[derive(Debug)]
        pub struct $metrics {
            registry: Registry,
            $(#[doc = $help] pub $name: $kind,)+
        }

        #[allow(non_upper_case_globals)] // a metric's declaration has the metric's name
        mod declarations {
            use super::*;

            $(pub(super) const $name: Declaration = Declaration {
                name: stringify!($name),
                help: $help.trim_ascii(),
                labels: &[$($($label),+)?],
                buckets: optional!($($buckets)?),
            };)+
        }

        impl $metrics {
            /// All declarations, in order.
            pub const DECLARATIONS: &[Declaration] = &[$(declarations::$name),+];

            fn register() -> Self {
                let registry = Registry::new();
                Self { $($name: declarations::$name.register(&registry),)+ registry }
            }
        }
    };
}

pub(super) use {metrics, optional};
