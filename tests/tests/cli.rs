//! The command line where it needs no server: names, answers, configuration.

use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt as _;

use waltide_tests::{Scratch, Waltide};

#[test]
fn both_programs_go_by_their_own_name_in_help_completions_and_manual_pages() {
    let scratch = Scratch::new("names");
    let (waltide, pitr) = (Waltide::new(&scratch), Waltide::new(&scratch).restore_pitr());
    assert!(waltide.ok(["--version"]).stdout.starts_with("waltide "));
    assert!(pitr.ok(["--version"]).stdout.starts_with("restore-pitr "));
    let help = pitr.ok(["--help"]).stdout;
    assert!(help.starts_with("Restore the cluster as it was at"), "{help}");
    assert!(help.contains("Usage: restore-pitr [OPTIONS] --data-dir <DIR>"), "{help}");
    assert!(pitr.fails(2, ["--bogus"]).stderr.contains("Usage: restore-pitr "));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = waltide.ok(["completions", shell]).stdout;
        assert!(script.contains("waltide") && script.contains("retention-days"), "{script}");
        let script = waltide.ok(["completions", shell, "--program", "restore-pitr"]).stdout;
        assert!(script.contains("restore-pitr") && script.contains("before-drop"), "{script}");
        assert!(!script.contains("retention-days"), "{script}");
    }
    waltide.fails(2, ["completions", "csh"]);
    let pages = scratch.path().join("bin/manual pages/new");
    scratch.give_tree(&scratch.join("bin"));
    let written = waltide.json(["man", pages.to_str().unwrap()]);
    for page in ["waltide.1", "waltide-restore.1", "restore-pitr.1"] {
        assert!(written.as_array().unwrap().contains(&page.into()), "{page}: {written}");
    }
    let refused = waltide.fails(1, ["man", "/dev/null/pages"]);
    let want = "waltide: the manual pages cannot be written into /dev/null/pages\n";
    assert!(refused.stderr.starts_with(want), "{}", refused.stderr);
    let page = fs::read_to_string(pages.join("restore-pitr.1")).unwrap();
    assert!(page.contains("target\\-time") && page.contains("restore\\-pitr"), "{page}");
}

#[test]
fn an_answer_that_cannot_be_written_is_no_success() {
    let scratch = Scratch::new("answer");
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let run = |args: &[&str]| {
        let mut command = Waltide::new(&scratch).runner(args).into_command();
        let out = command.stdout(full()).stderr(std::process::Stdio::piped()).output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    let (status, told) = run(&["completions", "bash"]);
    assert_eq!(status, Some(1), "{told}");
    assert!(told.starts_with("waltide: the answer could not be written to stdout\n"), "{told}");
    let pages = scratch.join("bin/pages");
    scratch.give_tree(&scratch.join("bin"));
    assert_eq!(run(&["--json", "man", pages.to_str().unwrap()]).0, Some(1));
}

#[test]
fn a_flag_beats_the_environment_which_beats_the_file() {
    let scratch = Scratch::new("config");
    let waltide = Waltide::new(&scratch).current_dir(scratch.path());
    let file = |name: &str, text: &str| {
        scratch.file(name, text);
        scratch.join(name).to_str().unwrap().to_owned()
    };
    let config = file("a b.toml", "archive = '/from/the file'\n");
    // Which archive was meant is told by the failure, for none of these is there.
    let meant = |waltide: &Waltide, args: &[&str]| waltide.fails(1, args).stderr;
    let list = ["--config", &config, "list"];
    assert!(meant(&waltide, &list).contains("file:///from/the%20file"));
    let told = waltide.clone().env("WALTIDE_CONFIG", &config);
    assert!(meant(&told, &["list"]).contains("file:///from/the%20file"));
    let told = told.env("WALTIDE_ARCHIVE", "/from/environment");
    assert!(meant(&told, &["list"]).contains("file:///from/environment"));
    assert!(meant(&told, &["list", "--archive", "/from/flag"]).contains("file:///from/flag"));
    let told = told.env("WALTIDE_CONFIG", "");
    assert!(meant(&told, &["list"]).contains("file:///from/environment"));
    let garbled = std::ffi::OsString::from_vec(vec![b'/', 0xff]);
    let garbled = waltide.clone().env("WALTIDE_CONFIG", &config).env("WALTIDE_ARCHIVE", garbled);
    assert!(garbled.fails(2, ["list"]).stderr.contains("WALTIDE_ARCHIVE is not UTF-8"));
    // An empty name does without the cache.
    meant(&told, &["list", "--cache", ""]);
    let none = waltide.fails(2, ["list"]);
    assert!(none.stderr.contains("no archive is named"), "{}", none.stderr);

    // A .env stands in for the environment alone, and only where it is asked for.
    file(".env", "export WALTIDE_ARCHIVE='/from/dotenv' # there\n");
    assert!(meant(&waltide, &list).contains("file:///from/the%20file"));
    let dotenv = file("dotenv.toml", "dotenv = true\narchive = '/from/file'\n");
    let list = ["--config", &dotenv, "list"];
    assert!(meant(&waltide, &list).contains("file:///from/dotenv"));
    assert!(
        meant(&waltide.clone().env("WALTIDE_ARCHIVE", "/from/environment"), &list)
            .contains("/from/environment")
    );

    for (text, why) in [
        ("archiv = '/x'\n", "unknown field `archiv`"),
        ("archive = '/x'\ncompression_level = 77\n", "compression_level 77 is not between 1 and 19"),
        ("archive = \n", "TOML parse error"),
    ] {
        let wrong = file("wrong.toml", text);
        for (status, args) in
            [(2, ["backup", "--data-dir", "/x"]), (2, ["push", "/x", "-q"]), (126, ["fetch", "a", "b"])]
        {
            let refused = waltide.fails(status, ["--config", &wrong].into_iter().chain(args));
            let is_usage = args[0] == "fetch";
            assert!(is_usage || refused.stderr.contains(why), "{}", refused.stderr);
        }
    }
}
