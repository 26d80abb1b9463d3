//! `nfold gamma`: γ of an activation, computed in four ways.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use clap::builder::FalseyValueParser;
use serde_json::{Value, json};

use crate::nets::gamma::{self, GateSimulation, NON_LINEARITIES, NonLinearity};

/// The simulated gate: channels, reduced channels and pixels of a middle block of nf_regnet_b1 at 256 pixels.
const GATE: (usize, usize, usize) = (232, 56, 256);
/// Random numbers per simulated gate, about; `--samples` divided by it is the number of gates.
const NUMBERS_A_GATE: u64 = 2 * 232 * 56;

/// Arguments of `nfold gamma`.
#[derive(Debug, Args)]
pub struct GammaArgs {
    /// Activation by timm's name, such as relu or silu; `se` for the factor after squeeze-and-excitation; `all`
    activation: String,
    /// Size of the simulated sample
    #[arg(long, env = "NFOLD_SAMPLES", default_value_t = 1 << 22, value_parser = clap::value_parser!(u64).range(2..=1 << 32), value_name = "N")]
    samples: u64,
    /// Seed of the simulation
    #[arg(long, env = "NFOLD_SEED", default_value_t = 0)]
    seed: u64,
    /// Print as JSON
    #[arg(long, env = "NFOLD_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// Runs `nfold gamma`.
pub fn run(args: &GammaArgs) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout().lock();
    let asked = args.activation.as_str();
    if matches!(asked, "se" | "squeeze_excite") {
        let gate = gate(args);
        if args.json {
            writeln!(out, "{:#}", gate_as_json(&gate))?;
        } else {
            write!(out, "{}", describe_gate(&gate))?;
        }
    } else if asked == "all" {
        let all: Vec<Gamma> = NON_LINEARITIES.iter().map(|n| Gamma::of(n, args)).collect();
        if args.json {
            let list: Vec<Value> = all.iter().map(Gamma::as_json).collect();
            writeln!(out, "{:#}", json!({ "activations": list, "squeeze_excite": gate_as_json(&gate(args)) }))?;
        } else {
            write!(out, "{}", table(&all))?;
        }
    } else if let Some(known) = gamma::find(asked) {
        let found = Gamma::of(&known, args);
        if args.json {
            writeln!(out, "{:#}", found.as_json())?;
        } else {
            write!(out, "{}", found.describe())?;
        }
    } else {
        let known = NON_LINEARITIES.map(|n| n.name).join(", ");
        bail!("activation `{asked}` is not known; known are {known}, se, all");
    }
    Ok(ExitCode::SUCCESS)
}

struct Gamma {
    name: &'static str,
    closed_form: Option<f64>,
    quadrature: gamma::Quadrature,
    simulation: gamma::Simulation,
    timm: Option<f64>,
}

impl Gamma {
    fn of(n: &NonLinearity, args: &GammaArgs) -> Self {
        Self {
            name: n.name,
            closed_form: n.closed_form(),
            quadrature: n.quadrature(),
            simulation: n.simulation(args.samples, args.seed),
            timm: n.timm,
        }
    }

    /// Difference of timm's constant from the exact value.
    fn timm_off(&self) -> Option<f64> {
        self.timm.map(|timm| timm / self.quadrature.gamma - 1.0)
    }

    fn as_json(&self) -> Value {
        json!({
            "activation": self.name,
            "closed_form": self.closed_form,
            "quadrature": { "gamma": self.quadrature.gamma, "relative_error_estimate": self.quadrature.relative_error },
            "simulation": {
                "gamma": self.simulation.gamma,
                "standard_error": self.simulation.standard_error,
                "samples": self.simulation.samples,
            },
            "timm": self.timm,
            "timm_relative_difference": self.timm_off(),
        })
    }

    fn describe(&self) -> String {
        let closed = self.closed_form.map_or_else(|| "none known".into(), |g| format!("{g:.15}"));
        let (q, s) = (self.quadrature, self.simulation);
        let timm = match (self.timm, self.timm_off()) {
            (Some(timm), Some(off)) => format!("{timm:.15}   relative difference from quadrature {off:+.2e}"),
            _ => "has none".into(),
        };
        let name = self.name;
        format!(
            "γ of {name}: 1/√Var[{name}(Z)], Z a unit Gaussian\n\
             closed form   {closed}\n\
             quadrature    {:.15}   relative error about {:.0e}\n\
             simulation    {:.15}   standard error {:.1e}, {} samples, {:+.1} standard errors from quadrature\n\
             timm          {timm}\n",
            q.gamma,
            q.relative_error.max(f64::EPSILON),
            s.gamma,
            s.standard_error,
            s.samples,
            // the sampling error of the identity may be 0
            (s.gamma - q.gamma) / s.standard_error.max(f64::MIN_POSITIVE),
        )
    }
}

fn table(all: &[Gamma]) -> String {
    let mut lines = format!(
        "{:<13} {:>14} {:>14} {:>14} {:>9} {:>14} {:>10}\n",
        "activation", "closed form", "quadrature", "simulation", "± s.e.", "timm", "timm off"
    );
    let optional = |v: Option<f64>| v.map_or_else(|| "-".into(), |v| format!("{v:.10}"));
    for g in all {
        let off = g.timm_off().map_or_else(|| "-".into(), |v| format!("{v:+.2e}"));
        lines += &format!(
            "{:<13} {:>14} {:>14.10} {:>14.10} {:>9.1e} {:>14} {:>10}\n",
            g.name,
            optional(g.closed_form),
            g.quadrature.gamma,
            g.simulation.gamma,
            g.simulation.standard_error,
            optional(g.timm),
            off
        );
    }
    lines
}

fn networks(args: &GammaArgs) -> u32 {
    (args.samples / NUMBERS_A_GATE).clamp(16, 100_000) as u32
}

fn gate(args: &GammaArgs) -> GateSimulation {
    let (channels, reduced, pixels) = GATE;
    gamma::simulate_gate(networks(args), channels, reduced, pixels, args.seed)
}

fn gate_as_json(gate: &GateSimulation) -> Value {
    json!({ "mean_gate": gate.mean_gate, "standard_error": gate.standard_error, "factor": gate.factor })
}

fn describe_gate(gate: &GateSimulation) -> String {
    let (channels, reduced, pixels) = GATE;
    format!(
        "squeeze-and-excitation at initialisation, {channels} channels, {reduced} reduced, unit Gaussian maps of {pixels} pixels\n\
         expected gate   {:.6}   standard error {:.1e}\n\
         factor          {:.6}   1/√E[gate²]: what the gated branch is multiplied by to keep its variance (timm: 2)\n",
        gate.mean_gate, gate.standard_error, gate.factor
    )
}
