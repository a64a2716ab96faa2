//! The `waltide` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    waltide::run(std::env::args_os().collect())
}
