//! Loading and unloading of models on a client's word: off unless the operator switches it on.

use std::sync::Arc;

use super::http::App;
use super::status::{ApiError, Code};

/// Opens the named model's newest version and serves it.
pub(super) async fn load(app: &Arc<App>, name: &str) -> Result<(), ApiError> {
    allowed(app)?;
    let (app, name) = (app.clone(), name.to_string());
    let loaded = tokio::task::spawn_blocking(move || app.registry.load(&name, &app.metrics)).await;
    let loaded = loaded.map_err(|e| ApiError::internal(format!("loading a model panicked: {e}")))?;
    loaded.map_err(|e| ApiError::new(Code::InvalidRequest, e.to_string()))
}

/// Takes every version of the named model out of service; what is queued is still answered.
pub(super) async fn unload(app: &App, name: &str) -> Result<(), ApiError> {
    allowed(app)?;
    Ok(app.registry.unload(name)?)
}

fn allowed(app: &App) -> Result<(), ApiError> {
    match app.model_control {
        true => Ok(()),
        false => Err(ApiError::new(
            Code::InvalidRequest,
            "loading and unloading of models is switched off; start the server with --model-control",
        )),
    }
}
