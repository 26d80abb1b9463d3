//! Platforms that a server runs on: which of their contracts it answers, on which port, with models from where. Said by
//! `--hosts`, or by what a platform itself leaves in the environment.

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::{Args, ValueEnum};

use crate::server::{Hosts, VertexRoutes};

/// Where SageMaker unpacks a model.
const SAGEMAKER_MODEL: &str = "/opt/ml/model";
/// The port that SageMaker and Vertex AI ask on, unless their variables say another.
const PORT: u16 = 8080;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Host {
    Sagemaker,
    Vertex,
    Huggingface,
    KserveV1,
    Torchserve,
    /// None of them, whatever the environment says
    None,
}

#[derive(Debug, Args)]
pub(super) struct HostArgs {
    /// Platforms whose contracts are answered beside /v1 and /v2: `sagemaker` (/ping, /invocations), `vertex` (the routes of AIP_HEALTH_ROUTE and
    /// AIP_PREDICT_ROUTE), `huggingface` (POST /), `kserve-v1` (/v1/models/M:predict), `torchserve` (/ping, /predictions/M), or `none`. The first two
    /// make 8080 the HTTP port unless --http or --port is given [default: those that the environment shows: SAGEMAKER_BIND_TO_PORT or a folder /opt/ml/model, AIP_…, HF_TASK]
    #[arg(
        help_heading = "Addresses",
        long,
        value_enum,
        value_name = "HOST,…",
        env = "NFOLD_HOSTS",
        value_delimiter = ','
    )]
    hosts: Vec<Host>,
}

/// What platforms make of a server.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Platforms {
    pub(super) hosts: Hosts,
    /// The HTTP port, where nobody said another.
    pub(super) port: Option<u16>,
    /// Where models are, if they are not in the repository.
    pub(super) models: Option<PathBuf>,
}

/// What is seen of the machine.
struct Seen<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
    is_folder: &'a dyn Fn(&Path) -> bool,
}

impl HostArgs {
    /// By the flag and this process's environment.
    pub(super) fn resolve(&self) -> anyhow::Result<Platforms> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        resolve(&self.hosts, &Seen { variable: &variable, is_folder: &|path| path.is_dir() })
    }
}

fn resolve(named: &[Host], seen: &Seen<'_>) -> anyhow::Result<Platforms> {
    let set = |name: &str| (seen.variable)(name);
    let sagemaker_folder = PathBuf::from(SAGEMAKER_MODEL);
    let routes = ["AIP_HTTP_PORT", "AIP_HEALTH_ROUTE", "AIP_PREDICT_ROUTE"];
    let shows = |host: Host| match host {
        Host::Sagemaker => set("SAGEMAKER_BIND_TO_PORT").is_some() || (seen.is_folder)(&sagemaker_folder),
        Host::Vertex => routes.iter().any(|name| set(name).is_some()),
        Host::Huggingface => set("HF_TASK").as_deref() == Some("image-classification"),
        Host::KserveV1 | Host::Torchserve | Host::None => false,
    };
    if named.contains(&Host::None) && named.len() > 1 {
        return Err(anyhow!("--hosts none stands alone: leave out the others, or `none`"));
    }
    let is_on = |host: Host| if named.is_empty() { shows(host) } else { named.contains(&host) };
    let vertex = if is_on(Host::Vertex) {
        let route = |name: &str, default: &str| match set(name) {
            None => Ok(default.to_string()),
            Some(route) if route.starts_with('/') => Ok(route),
            Some(route) => Err(anyhow!("{name} is `{route}`, which is no path: it must start with /")),
        };
        let health = route("AIP_HEALTH_ROUTE", "/health")?;
        Some(VertexRoutes { health, predict: route("AIP_PREDICT_ROUTE", "/predict")? })
    } else {
        None
    };
    let hosts = Hosts {
        sagemaker: is_on(Host::Sagemaker),
        vertex,
        huggingface: is_on(Host::Huggingface),
        kserve_v1: is_on(Host::KserveV1),
        torchserve: is_on(Host::Torchserve),
    };
    let port = |name: &str| {
        let number = set(name).map(|text| text.parse().map_err(|_| anyhow!("{name} is `{text}`, which is no port")));
        number.transpose().map(|port| port.unwrap_or(PORT))
    };
    let port = if hosts.sagemaker {
        Some(port("SAGEMAKER_BIND_TO_PORT")?)
    } else if hosts.vertex.is_some() {
        Some(port("AIP_HTTP_PORT")?)
    } else {
        None
    };
    let huggingface_folder = set("HF_MODEL_DIR").filter(|_| hosts.huggingface).map(PathBuf::from);
    let folders = [huggingface_folder, Some(sagemaker_folder).filter(|_| hosts.sagemaker)];
    let models = folders.into_iter().flatten().find(|folder| (seen.is_folder)(folder));
    Ok(Platforms { hosts, port, models })
}

impl Platforms {
    /// Their names, for the log.
    pub(super) fn names(&self) -> Vec<&'static str> {
        let Hosts { sagemaker, vertex, huggingface, kserve_v1, torchserve } = &self.hosts;
        let all = [
            (*sagemaker, "sagemaker"),
            (vertex.is_some(), "vertex"),
            (*huggingface, "huggingface"),
            (*kserve_v1, "kserve-v1"),
            (*torchserve, "torchserve"),
        ];
        all.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(named: &[Host], variables: &[(&str, &str)], folders: &[&str]) -> anyhow::Result<Platforms> {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string());
        let is_folder = |path: &Path| folders.iter().any(|folder| Path::new(folder) == path);
        resolve(named, &Seen { variable: &variable, is_folder: &is_folder })
    }

    #[test]
    fn platforms_are_known_by_what_they_leave_in_the_environment() {
        assert_eq!(seen(&[], &[("PATH", "/bin")], &["/models"]).expect("none"), Platforms::default());
        let sagemaker = seen(&[], &[], &[SAGEMAKER_MODEL]).expect("SageMaker");
        assert_eq!((sagemaker.names(), sagemaker.port), (vec!["sagemaker"], Some(8080)));
        assert_eq!(sagemaker.models.as_deref(), Some(Path::new(SAGEMAKER_MODEL)));
        let elsewhere = seen(&[], &[("SAGEMAKER_BIND_TO_PORT", "9000")], &[]).expect("SageMaker");
        assert_eq!((elsewhere.port, elsewhere.models), (Some(9000), None));
        let variables = [("AIP_HTTP_PORT", "8081"), ("AIP_HEALTH_ROUTE", "/h"), ("AIP_PREDICT_ROUTE", "/v1/m:predict")];
        let vertex = seen(&[], &variables, &[]).expect("Vertex AI");
        let routes = VertexRoutes { health: "/h".into(), predict: "/v1/m:predict".into() };
        assert_eq!((vertex.hosts.vertex, vertex.port), (Some(routes), Some(8081)));
        let variables = [("HF_TASK", "image-classification"), ("HF_MODEL_DIR", "/repository")];
        let face = seen(&[], &variables, &["/repository"]).expect("Hugging Face");
        assert_eq!((face.names(), face.port), (vec!["huggingface"], None));
        assert_eq!(face.models.as_deref(), Some(Path::new("/repository")));
        assert!(seen(&[], &[("HF_TASK", "text-generation")], &[]).expect("none").names().is_empty());
    }

    #[test]
    fn the_flag_decides_where_it_is_given() {
        let none = seen(&[Host::None], &[("AIP_HTTP_PORT", "1")], &[SAGEMAKER_MODEL]).expect("none");
        assert_eq!(none, Platforms::default());
        let two = seen(&[Host::KserveV1, Host::Torchserve], &[("AIP_HTTP_PORT", "1")], &[]).expect("two");
        assert_eq!((two.names(), two.port), (vec!["kserve-v1", "torchserve"], None));
        let routes = VertexRoutes { health: "/health".into(), predict: "/predict".into() };
        let vertex = seen(&[Host::Vertex], &[], &[]).expect("Vertex AI");
        assert_eq!((vertex.hosts.vertex, vertex.port), (Some(routes), Some(8080)));
        for (named, variables) in [
            (&[Host::None, Host::Vertex][..], &[][..]),
            (&[], &[("AIP_PREDICT_ROUTE", "predict")]),
            (&[], &[("AIP_HTTP_PORT", "http")]),
            (&[], &[("SAGEMAKER_BIND_TO_PORT", "99999")]),
        ] {
            assert!(seen(named, variables, &[]).is_err(), "{named:?} {variables:?}");
        }
    }
}
