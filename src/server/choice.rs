//! Which model a request is for: its path, query or headers may say so, and the body of a form or of JSON.

use std::sync::Arc;

use super::app::App;
use super::bodies::upload::{Asked, Kind};
use super::status::{ApiError, Code};
use crate::infer::registry::LiveModel;

/// The choice of a model, as far as it is known before the body is read.
#[derive(Debug)]
pub(super) struct Choice {
    model: Option<String>,
    version: Option<u64>,
    /// `None`: the body may name one.
    known: Option<Arc<LiveModel>>,
}

impl Choice {
    /// By what is said outside of a body of this kind. A name that is wrong is refused, so that it costs no upload.
    pub(super) fn before(
        app: &App,
        model: Option<String>,
        version: Option<u64>,
        kind: &Kind,
    ) -> Result<Self, ApiError> {
        let found = app.registry.find(model.as_deref(), version);
        let open = model.is_none() && kind.may_name_a_model() && app.registry.all().len() > 1;
        let known = if open { None } else { Some(found?) };
        Ok(Self { model, version, known })
    }

    /// The model, if it is known before the body.
    pub(super) fn known(&self) -> Option<&Arc<LiveModel>> {
        self.known.as_ref()
    }

    /// Most images that a request may hold, as far as that is known.
    pub(super) fn images(&self, app: &App) -> usize {
        let limit = |model: &Arc<LiveModel>| model.scheduler().queue_limit();
        match &self.known {
            Some(model) => limit(model),
            None => app.registry.all().iter().map(limit).max().unwrap_or(1),
        }
    }

    /// The model, by what the body says as well.
    pub(super) fn after(self, app: &App, asked: &Asked) -> Result<Arc<LiveModel>, ApiError> {
        let Self { model, version, known } = self;
        agree("models", "body", model.as_deref(), asked.model.as_deref())?;
        agree("versions", "body", version, asked.version)?;
        match known {
            Some(known) if asked.model.is_none() && asked.version.is_none() => Ok(known),
            _ => {
                let name = asked.model.as_deref().or(model.as_deref());
                Ok(app.registry.find(name, asked.version.or(version))?)
            }
        }
    }
}

/// Refuses what is named twice and not alike: outside, and in this place of the request.
pub(super) fn agree<T: PartialEq + ToString>(
    what: &str,
    place: &str,
    outside: Option<T>,
    inside: Option<T>,
) -> Result<(), ApiError> {
    let (Some(outside), Some(inside)) = (outside, inside) else { return Ok(()) };
    if outside == inside {
        return Ok(());
    }
    let [outside, inside] = [outside, inside].map(|name| name.to_string().escape_debug().to_string());
    let text = format!("the request names two {what}, `{outside}` and, in its {place}, `{inside}`; name one");
    Err(ApiError::new(Code::InvalidRequest, text))
}
