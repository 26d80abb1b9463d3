//! Parsing threads: whatever a client can make long (decompressing, parsing, writing large responses) runs here and not
//! on the async I/O threads, on as many threads as there are cores. Other work waits, and is dropped once its deadline
//! has passed.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;

use super::super::status::{ApiError, Code};

/// Work on fewer bytes than this takes microseconds, and runs in place.
pub(in crate::server) const INLINE: usize = 16 * 1024;

/// The permits for parsing threads.
#[derive(Debug, Clone)]
pub(in crate::server) struct ParseThreads {
    free: Arc<Semaphore>,
}

impl ParseThreads {
    /// As many permits as there are cores.
    pub(in crate::server) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { free: Arc::new(Semaphore::new(cores)) }
    }

    /// Runs `work`, which handles about `bytes` bytes: in place if these are few, else on a blocking thread once a
    /// permit is free. Fails once `deadline` has passed.
    pub(in crate::server) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        deadline: Instant,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if bytes <= INLINE {
            return work();
        }
        let free = tokio::time::timeout_at(deadline.into(), self.free.clone().acquire_owned()).await;
        // the semaphore is never closed: acquiring can't fail
        let permit = free.map_err(|_| too_late())?.ok();
        let done = tokio::task::spawn_blocking(move || {
            let _until_it_ends = permit;
            if Instant::now() >= deadline { Err(too_late()) } else { work() }
        });
        match tokio::time::timeout_at(deadline.into(), done).await {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(ApiError::internal(format!("work on a request panicked: {panic}"))),
            Err(_) => Err(too_late()),
        }
    }
}

/// The error if the deadline passed before the request was read.
pub(in crate::server) fn too_late() -> ApiError {
    ApiError::new(Code::DeadlineExceeded, "the deadline passed before the request had been read")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_is_late_is_not_begun() {
        let threads = ParseThreads { free: Arc::new(Semaphore::new(1)) };
        let (begin, begun) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let busy = threads.clone();
        let busy = tokio::spawn(async move {
            let work = move || {
                begin.send(()).expect("the test waits");
                ended.recv().expect("the test says when");
                Ok(1)
            };
            busy.run(INLINE + 1, Instant::now() + Duration::from_secs(60), work).await
        });
        tokio::task::spawn_blocking(move || begun.recv()).await.expect("runs").expect("begun");
        let soon = Instant::now() + Duration::from_millis(20);
        let late = threads.run(INLINE + 1, soon, || -> Result<(), _> { panic!("begun past its deadline") }).await;
        assert_eq!(late.expect_err("late").code, Code::DeadlineExceeded);
        assert_eq!(threads.run(INLINE, soon, || Ok(2)).await.expect("little is done at once"), 2);
        end.send(()).expect("it waits");
        assert_eq!(busy.await.expect("runs").expect("done"), 1);
        let broken =
            threads.run(INLINE + 1, Instant::now() + Duration::from_secs(60), || -> Result<(), _> { panic!("x") });
        assert_eq!(broken.await.expect_err("panicked").code, Code::Internal);
        assert_eq!(threads.free.available_permits(), 1);
    }
}
