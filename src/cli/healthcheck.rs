//! `nfold healthcheck`: whether the local server is ready.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::Args;

use super::addresses::connect;
use super::serve::positive;

/// Exits 0 when the server is ready; for containers without a shell.
#[derive(Debug, Args)]
pub struct HealthcheckArgs {
    /// Admin port of the server
    #[arg(long, value_name = "ADDR", env = "NFOLD_ADMIN", default_value = "127.0.0.1:8002")]
    admin: String,
    /// How long to wait for the response
    #[arg(long, value_name = "TIME", env = "NFOLD_HEALTHCHECK_TIMEOUT", default_value = "2s", value_parser = positive)]
    timeout: Duration,
}

/// Requests `/readyz` once.
pub fn run(args: &HealthcheckArgs) -> anyhow::Result<ExitCode> {
    let HealthcheckArgs { admin, timeout } = args;
    // NFOLD_ADMIN is usually the address that the server listens on
    let address = connect(admin).map_err(|e| anyhow!("`{admin}` is no address: {e}"))?;
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&address, *timeout)?;
        stream.set_read_timeout(Some(*timeout))?;
        stream.set_write_timeout(Some(*timeout))?;
        stream.write_all(format!("GET /readyz HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n\r\n").as_bytes())?;
        let mut answer = Vec::new();
        stream.take(4096).read_to_end(&mut answer)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer =
        ask().map_err(|e| anyhow!("no answer from {address}: {e}; is `nfold serve` running with this --admin?"))?;
    let status = answer.split_whitespace().nth(1).unwrap_or_default();
    match status {
        "200" => Ok(ExitCode::SUCCESS),
        _ => bail!("{}", answer.rsplit("\r\n").next().unwrap_or_default().trim()),
    }
}
