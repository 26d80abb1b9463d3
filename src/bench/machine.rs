//! Describes the machine of a measurement, so that figures can be judged and reproduced. Reads the system; measures
//! nothing.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// CPU flags that determine the speed of convolutions, and `hypervisor`.
const EXTENSIONS: [&str; 8] = ["avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_tile", "asimd", "hypervisor"];

/// Machine and versions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the processor.
    pub processor: String,
    /// Cores available to this process.
    pub cores: usize,
    /// CPU flags that it has; `hypervisor` marks a virtual machine.
    pub extensions: Vec<String>,
    /// Memory in GiB.
    pub memory_gib: f64,
    /// Frequency governor; absent on virtual machines.
    pub governor: Option<String>,
    /// Operating system.
    pub system: String,
    /// Kernel release.
    pub kernel: String,
    /// Build information of ONNX Runtime, if it ran in this process.
    pub onnxruntime: Option<String>,
    /// nfold's version.
    pub nfold: String,
    /// Command line, program name first.
    pub command: Vec<String>,
    /// Time of the measurement, in seconds since 1970-01-01 UTC.
    pub unix_time: u64,
    /// Load average of the minute before; above 0.5 the machine was not idle.
    pub load_average: Option<f64>,
}

impl Machine {
    /// Time of the measurement as text: `2026-11-26 14:05 UTC`.
    pub fn date(&self) -> String {
        let at = i64::try_from(self.unix_time).ok().and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok());
        let written = |at: time::OffsetDateTime| format!("{} {:02}:{:02} UTC", at.date(), at.hour(), at.minute());
        at.map_or_else(|| format!("{} s after 1970", self.unix_time), written)
    }

    /// Describes this machine now. `onnxruntime` is ONNX Runtime's build information.
    pub fn look(onnxruntime: Option<String>) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|l| l.split([':', '=']).next().is_some_and(|k| k.trim() == key))?;
            Some(line.split_once([':', '='])?.1.trim().trim_matches('"').to_string())
        };
        let info = read("/proc/cpuinfo");
        let flags = field(&info, "flags").or_else(|| field(&info, "Features")).unwrap_or_default();
        let memory = field(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let kib: f64 = memory.split_whitespace().next().and_then(|v| v.parse().ok()).unwrap_or(0.0);
        let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").trim().to_string();
        let mut command: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        if let Some(program) = command.first_mut() {
            *program = env!("CARGO_PKG_NAME").into();
        }
        Self {
            processor: field(&info, "model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            extensions: EXTENSIONS
                .into_iter()
                .filter(|e| flags.split_whitespace().any(|f| f == *e))
                .map(String::from)
                .collect(),
            memory_gib: (kib / 1024.0 / 1024.0 * 10.0).round() / 10.0,
            governor: (!governor.is_empty()).then_some(governor),
            system: field(&read("/etc/os-release"), "PRETTY_NAME").unwrap_or_else(|| std::env::consts::OS.into()),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
            onnxruntime,
            nfold: env!("CARGO_PKG_VERSION").into(),
            command,
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            load_average: read("/proc/loadavg").split_whitespace().next().and_then(|v| v.parse().ok()),
        }
    }
}

/// Processor time since boot: total, and stolen by the hypervisor for other machines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProcessorTime {
    total: f64,
    stolen: f64,
}

impl ProcessorTime {
    /// Reads the counters; `None` on systems without them.
    pub fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<f64> = line.split_whitespace().map_while(|t| t.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal; user already includes guest
        Some(Self { total: ticks.iter().take(8).sum(), stolen: *ticks.get(7)? })
    }

    /// Share of processor time since `earlier` that the hypervisor stole; above 0.01 the figures are affected.
    pub fn stolen_since(self, earlier: Self) -> f64 {
        let total = self.total - earlier.total;
        if total > 0.0 { (self.stolen - earlier.stolen) / total } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_a_share() {
        let at =
            |steal: u32, idle: u32| ProcessorTime::parse(&format!("cpu  10 0 0 {idle} 0 0 0 {steal} 99 99\ncpu0 1"));
        let (before, after) = (at(0, 100).expect("parses"), at(25, 175).expect("parses"));
        assert_eq!(after.stolen_since(before), 0.25);
        assert_eq!(before.stolen_since(before), 0.0);
        assert_eq!(ProcessorTime::parse("intr 1"), None);
    }
}
