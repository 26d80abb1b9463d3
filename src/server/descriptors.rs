//! File descriptors: raises the soft limit and divides the descriptors among the ports.

use crate::metrics::Port;

/// Descriptors reserved for files: models, certificates and keys that are read again.
const RESERVE: u64 = 16;
/// Most and least connections of the admin port; the least where descriptors are few.
const ADMIN: (u64, u64) = (64, 8);
/// The admin port gets one in this many free descriptors.
const ADMIN_PART: u64 = 8;

/// Connections that each port may have open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shares {
    /// Of the HTTP port, and of the gRPC port.
    clients: u64,
    admin: u64,
}

impl Shares {
    /// Divides what is left of `limit` descriptors when `used` are open and each client port wants `asked` connections.
    fn new(limit: u64, used: u64, asked: u64) -> Self {
        let free = limit.saturating_sub(used + RESERVE);
        let admin = (free / ADMIN_PART).clamp(ADMIN.1, ADMIN.0);
        Self { clients: asked.min(free.saturating_sub(admin) / 2).max(1), admin }
    }

    /// The share of `port`.
    pub(super) fn of(self, port: Port) -> usize {
        let share = if port == Port::Admin { self.admin } else { self.clients };
        usize::try_from(share).unwrap_or(usize::MAX)
    }
}

/// Raises the soft limit of this process to the hard limit and divides it; logs a warning if that is less than asked
/// for.
pub(super) fn share(asked: usize) -> Shares {
    let asked = asked as u64;
    let Some(limit) = raise() else { return Shares { clients: asked, admin: ADMIN.0 } };
    // where the system can't count them: enough for the runtime and a few models
    let used = std::fs::read_dir("/proc/self/fd").map_or(64, |open| open.count() as u64);
    let shares = Shares::new(limit, used, asked);
    if shares.clients < asked {
        let connections = shares.clients;
        tracing::warn!(
            connections,
            asked,
            descriptors = limit,
            "only {connections} connections a port fit the system's limit of {limit} descriptors; raise it (ulimit -n, \
             LimitNOFILE) or lower --connections"
        );
    }
    shares
}

/// The limit after raising it; `None` if the system has none or does not tell.
#[cfg(unix)]
fn raise() -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of descriptors could not be raised: {error}");
        return current;
    }
    maximum
}

#[cfg(not(unix))]
fn raise() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_has_a_share_and_together_they_fit() {
        for limit in [64, 100, 256, 1024, 4096, 1 << 20] {
            for asked in [1, 40, 1024, 1_000_000] {
                let shares = Shares::new(limit, 24, asked);
                let all = 2 * shares.clients + shares.admin + 24 + RESERVE;
                assert!(all <= limit, "{limit} {asked}: {shares:?}");
                assert!(
                    (1..=asked).contains(&shares.clients) && shares.admin >= ADMIN.1,
                    "{limit} {asked}: {shares:?}"
                );
            }
        }
        assert_eq!(Shares::new(1 << 20, 24, 1024), Shares { clients: 1024, admin: 64 });
        // too few even for the minimum: each port still gets some
        assert_eq!(Shares::new(10, 24, 1024), Shares { clients: 1, admin: 8 });
    }
}
