//! `trainer`: see `trainer --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    trainer::run(std::env::args_os())
}
