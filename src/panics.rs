//! What a caught panic says.

use std::any::Any;

/// The text of a panic; `no message` where it carried something else.
pub fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn any_payload_has_a_message() {
        let caught = |work: fn()| message(catch_unwind(work).expect_err("panics").as_ref());
        assert_eq!(caught(|| panic!("plain")), "plain");
        assert_eq!(caught(|| panic!("{}", 7)), "7");
        assert_eq!(caught(|| std::panic::panic_any(7)), "no message");
    }
}
