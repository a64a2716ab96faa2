//! The fuzzers' corpora, replayed on stable Rust through the very functions that they call.

#[allow(unreachable_pub, clippy::cast_possible_truncation)] // it is a crate of its own in fuzz/
#[path = "../../fuzz/src/lib.rs"]
mod targets;

#[test]
fn every_corpus_is_replayed() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus");
    for (name, run) in targets::TARGETS {
        let directory = std::fs::read_dir(format!("{root}/{name}"));
        let inputs: Vec<_> = directory
            .unwrap_or_else(|e| panic!("corpus of {name}: {e}"))
            .map(|e| e.unwrap().path())
            .collect();
        assert!(!inputs.is_empty(), "the corpus of {name} is empty");
        for input in inputs {
            run(&std::fs::read(&input).unwrap());
        }
    }
}

#[test]
fn every_target_has_a_program() {
    let manifest =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/Cargo.toml")).unwrap();
    for (name, _) in targets::TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is missing from fuzz/Cargo.toml");
    }
}
