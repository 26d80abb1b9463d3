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
        if let (Some(outside), Some(inside)) = (&model, &asked.model)
            && outside != inside
        {
            let (outside, inside) = (outside.escape_debug(), inside.escape_debug());
            let text = format!("the request names two models, `{outside}` and, in its body, `{inside}`; name one");
            return Err(ApiError::new(Code::InvalidRequest, text));
        }
        match known {
            Some(known) if asked.model.is_none() && asked.version.is_none() => Ok(known),
            _ => {
                let name = asked.model.as_deref().or(model.as_deref());
                Ok(app.registry.find(name, asked.version.or(version))?)
            }
        }
    }
}
