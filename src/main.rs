//! The `nfold` program.
fn main() {}
