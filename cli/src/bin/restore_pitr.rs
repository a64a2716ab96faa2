//! The `restore-pitr` command: `waltide restore` under the name the operators' guides give it.

use std::process::ExitCode;

fn main() -> ExitCode {
    waltide::run_restore(std::env::args_os().collect())
}
