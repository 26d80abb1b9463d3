//! Parses addresses as users type them: `0.0.0.0:8000`, `localhost:9000`, `:9000`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _};

/// An address to listen on; without a host, on every interface.
pub fn listen(text: &str) -> Result<SocketAddr, String> {
    resolve(text, IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// An address to connect to; without a host, or with a wildcard address, this machine.
pub fn connect(text: &str) -> Result<SocketAddr, String> {
    let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut address = resolve(text, here)?;
    if address.ip().is_unspecified() {
        address.set_ip(here);
    }
    Ok(address)
}

fn resolve(text: &str, here: IpAddr) -> Result<SocketAddr, String> {
    let wanted = "give HOST:PORT, such as 0.0.0.0:8000, localhost:8000 or :8000";
    if let Some(port) = text.strip_prefix(':') {
        return port.parse().map(|port| SocketAddr::new(here, port)).map_err(|_| format!("no port; {wanted}"));
    }
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let found: Vec<_> = text.to_socket_addrs().map_err(|e| format!("{e}; {wanted}"))?.collect();
    // `localhost` may be both; programs that support only one family support IPv4
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first.copied().ok_or_else(|| format!("the name has no address; {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_may_be_short() {
        for (text, listening, connecting) in [
            ("0.0.0.0:8000", "0.0.0.0:8000", "127.0.0.1:8000"),
            (":9000", "0.0.0.0:9000", "127.0.0.1:9000"),
            ("127.0.0.2:1", "127.0.0.2:1", "127.0.0.2:1"),
            ("[::1]:80", "[::1]:80", "[::1]:80"),
            ("[::]:80", "[::]:80", "127.0.0.1:80"),
            ("localhost:9000", "127.0.0.1:9000", "127.0.0.1:9000"),
        ] {
            assert_eq!(listen(text), listening.parse().map_err(|_| String::new()), "{text}");
            assert_eq!(connect(text), connecting.parse().map_err(|_| String::new()), "{text}");
        }
        for bad in ["", ":", "8000", "localhost", ":70000", "http://localhost:80"] {
            assert!(listen(bad).is_err_and(|e| e.contains("HOST:PORT")), "{bad}");
        }
    }
}
