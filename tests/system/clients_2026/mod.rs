//! The clients of 2026, scripted: each asks exactly as its current source does, for Debian's packages are older.

mod m07;
