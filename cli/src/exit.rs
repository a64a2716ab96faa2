//! Exit statuses, and how a failure is told: one place for both.

use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;

use crate::output;

/// What the caller reads from `fetch` when it is anything but "not there".
const FETCH_FAILED: u8 = 126;

/// Stands for the one failure of `fetch` that PostgreSQL reads as "not there". No other failure may, so it is not 1,
/// which any error is unless somebody says otherwise.
const NOT_THERE: u8 = 255;

/// Whether PostgreSQL reads the status as its restore_command's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Fetch,
    Other,
}

impl Verb {
    /// Which command the arguments name, found without a parser: a usage error of `fetch` counts as `fetch`'s.
    pub(crate) fn of(args: &[OsString]) -> Self {
        let mut words = args.iter().skip(1).map(|a| a.to_string_lossy());
        while let Some(word) = words.next() {
            match word.as_ref() {
                "--archive" | "--cluster" | "--system" | "--cache" | "--config" | "--threads" => {
                    words.next();
                }
                "fetch" => return Self::Fetch,
                other if other.starts_with('-') => {}
                _ => return Self::Other,
            }
        }
        Self::Other
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    status: u8,
    text: String,
    source: Option<Box<dyn Error + Send + Sync>>,
    hint: Option<String>,
}

impl Failure {
    /// The command was not called right.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::message(2, text)
    }

    /// It could not be done, for this reason.
    pub(crate) fn failed(text: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self { status: 1, text: text.into(), source: Some(Box::new(source)), hint: None }
    }

    /// The archive is at fault.
    pub(crate) fn damaged(text: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self { status: 3, ..Self::failed(text, source) }
    }

    /// A text of our own.
    pub(crate) fn message(status: u8, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), source: None, hint: None }
    }

    /// The answer was printed; only the status is left to give.
    pub(crate) fn silent(status: u8) -> Self {
        Self::message(status, "")
    }

    /// What PostgreSQL asked for is not in the archive.
    pub(crate) fn not_there(text: impl Into<String>) -> Self {
        Self::message(NOT_THERE, text)
    }

    /// Whether it is that.
    pub(crate) fn is_not_there(&self) -> bool {
        self.status == NOT_THERE
    }

    /// What to do about it.
    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// What went wrong, in words.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The same with another status.
    pub(crate) fn status(self, status: u8) -> Self {
        Self { status, ..self }
    }
}

/// An operation's error is failure 1; an operation that knows better says so with [`Failure::status`].
impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(e: E) -> Self {
        // Whole, so that every cause behind it can be told.
        Self { status: 1, text: e.to_string(), source: Some(Box::new(e)), hint: None }
    }
}

/// Prints a failure and gives the status it ends with.
pub(crate) fn report(failure: &Failure, verb: Verb) -> ExitCode {
    if !failure.text.is_empty() {
        output::error(&failure.text);
        let mut told = failure.text.clone();
        let mut cause = failure.source.as_deref().map(|e| e as &dyn Error);
        while let Some(e) = cause {
            let text = e.to_string();
            if !told.contains(&text) {
                output::cause(&text);
            }
            told = text;
            cause = e.source();
        }
        if let Some(hint) = &failure.hint {
            output::hint(hint);
        }
    }
    match (verb, failure.status) {
        (Verb::Fetch, 0) => ExitCode::SUCCESS,
        (Verb::Fetch, NOT_THERE) => ExitCode::from(1),
        (Verb::Fetch, _) => ExitCode::from(FETCH_FAILED),
        (Verb::Other, status) => ExitCode::from(status),
    }
}

/// What the parser refuses is status 2, what it was asked to print (`--help`) is 0.
pub(crate) fn clap_error(e: &clap::Error, verb: Verb) -> ExitCode {
    let _ = e.print();
    match (e.use_stderr(), verb) {
        (false, _) => ExitCode::SUCCESS,
        (true, Verb::Fetch) => ExitCode::from(FETCH_FAILED),
        (true, Verb::Other) => ExitCode::from(2),
    }
}

/// A panic must not leave a status that PostgreSQL misreads.
pub(crate) fn install_panic_hook(verb: Verb) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        std::process::exit(match verb {
            Verb::Fetch => i32::from(FETCH_FAILED),
            Verb::Other => 1,
        });
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_not_there_is_told_to_postgresql_as_1() {
        let status = |f: Failure| format!("{:?}", report(&f, Verb::Fetch));
        assert_eq!(status(Failure::not_there("")), format!("{:?}", ExitCode::from(1)));
        for other in [Failure::silent(1), Failure::usage(""), Failure::silent(3)] {
            assert_eq!(status(other), format!("{:?}", ExitCode::from(126)));
        }
    }

    #[test]
    fn fetch_is_known_even_where_the_parser_refuses_the_rest() {
        let verb = |words: &[&str]| Verb::of(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(verb(&["waltide", "--archive", "fetch", "push", "x"]), Verb::Other);
        assert_eq!(verb(&["waltide", "--archive", "/a", "-v", "--bogus", "fetch"]), Verb::Fetch);
        assert_eq!(verb(&["waltide", "restore", "fetch"]), Verb::Other);
        assert_eq!(verb(&["waltide", "--system", "7", "--cache", "", "fetch"]), Verb::Fetch);
        assert_eq!(verb(&["waltide"]), Verb::Other);
    }
}
