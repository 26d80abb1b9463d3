//! A request's deadline, from the protocol's headers and the server's own limit.

use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName};

use super::status::{ApiError, Code};

const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Deadline by `x-request-timeout-ms`, at most `longest` from now.
pub(super) fn http(headers: &HeaderMap, longest: Duration) -> Result<Instant, ApiError> {
    let asked = headers.get(TIMEOUT).map(|value| {
        let millis = value.to_str().ok().and_then(|t| t.trim().parse::<u64>().ok()).filter(|&ms| ms > 0);
        millis.map(Duration::from_millis).ok_or_else(|| {
            ApiError::new(Code::InvalidRequest, "header `x-request-timeout-ms` is not a positive whole number")
        })
    });
    let timeout = asked.transpose()?.map_or(longest, |asked| asked.min(longest));
    Ok(Instant::now() + timeout)
}

/// Deadline by `grpc-timeout` (up to 8 digits and one of `H`, `M`, `S`, `m`, `u`, `n`), at most `longest` from now.
pub(super) fn grpc(headers: &HeaderMap, longest: Duration) -> Result<Instant, ApiError> {
    Ok(Instant::now() + asked(headers)?.map_or(longest, |asked| asked.min(longest)))
}

/// Deadline of a whole stream by `grpc-timeout`; `None` if the client sets none.
pub(super) fn of_stream(headers: &HeaderMap) -> Result<Option<Instant>, ApiError> {
    // a deadline beyond the clock's range is no deadline
    Ok(asked(headers)?.and_then(|asked| Instant::now().checked_add(asked)))
}

fn asked(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let asked = headers.get(GRPC_TIMEOUT).map(|value| {
        value.to_str().ok().and_then(grpc_timeout).ok_or_else(|| {
            ApiError::new(Code::InvalidRequest, "`grpc-timeout` is not up to 8 digits and one of H, M, S, m, u, n")
        })
    });
    asked.transpose()
}

fn grpc_timeout(text: &str) -> Option<Duration> {
    let (at, unit) = text.char_indices().next_back()?;
    let digits = &text[..at];
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(number * 3600),
        'M' => Duration::from_secs(number * 60),
        'S' => Duration::from_secs(number),
        'm' => Duration::from_millis(number),
        'u' => Duration::from_micros(number),
        'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts() {
        assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(grpc_timeout("1S"), Some(Duration::from_secs(1)));
        assert_eq!(grpc_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "1", "1x", "-1m", "123456789m", "1 m", "1é"] {
            assert_eq!(grpc_timeout(bad), None, "{bad}");
        }
    }
}
