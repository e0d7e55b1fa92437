//! The `ifnewer` program.
fn main() {}
