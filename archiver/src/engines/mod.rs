//! One folder per engine, with the same names in `format`, `archiver` and `replay`.

pub mod postgres;
