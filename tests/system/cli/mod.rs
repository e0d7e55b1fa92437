//! The command line: operator commands, `setup`, `doctor`, `ca`, and errors at start.

pub mod archives;
pub mod ca;
pub mod commands;
pub mod config_errors;
pub mod doctor;
pub mod first_start;
pub mod setup;
pub mod terminal;
