//! The built `waltide` and `restore-pitr`, called as PostgreSQL and operators call them.

use crate::{Background, Output, Runner, Scratch};
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// A way of calling the binaries: which archive, which cluster, as which user, with which environment.
#[derive(Clone, Debug)]
pub struct Waltide {
    bin_dir: PathBuf,
    scratch: Scratch,
    program: &'static str,
    archive: Option<OsString>,
    cluster: Option<String>,
    as_postgres: bool,
    environment: Vec<(OsString, OsString)>,
    current_dir: PathBuf,
}

impl Waltide {
    /// The binaries of this build, put where the database's user can execute them: in `bin` of the scratch,
    /// for the checkout may lie under a home directory. They run as the database's user unless said.
    #[track_caller]
    pub fn new(scratch: &Scratch) -> Self {
        let bin_dir = scratch.join("bin");
        if !bin_dir.exists() {
            fs::create_dir(&bin_dir).expect("the scratch can be written");
            fs::set_permissions(&bin_dir, fs::Permissions::from_mode(0o755)).expect("we made it");
            for name in ["waltide", "restore-pitr"] {
                install(&built_binary(name), &bin_dir.join(name));
            }
        }
        Self {
            bin_dir,
            scratch: scratch.clone(),
            program: "waltide",
            archive: None,
            cluster: None,
            as_postgres: true,
            environment: Vec::new(),
            current_dir: scratch.path().to_owned(),
        }
    }

    /// Gives every call this `--archive`: a URL or a path.
    pub fn archive(mut self, url: impl Into<OsString>) -> Self {
        self.archive = Some(url.into());
        self
    }

    /// Gives every call this `--cluster`.
    pub fn cluster(mut self, name: &str) -> Self {
        self.cluster = Some(name.to_owned());
        self
    }

    /// Runs as the database's operating system user, which is how it starts out.
    pub fn as_postgres(mut self) -> Self {
        self.as_postgres = true;
        self
    }

    /// Runs as the user of the test.
    pub fn as_self(mut self) -> Self {
        self.as_postgres = false;
        self
    }

    /// Calls `restore-pitr` instead of `waltide`.
    pub fn restore_pitr(mut self) -> Self {
        self.program = "restore-pitr";
        self
    }

    /// Sets an environment variable for every call.
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((key.into(), value.into()));
        self
    }

    /// Runs in this directory; the scratch unless said.
    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.current_dir = dir.into();
        self
    }

    /// Where the binary lies that the database's user can execute.
    pub fn program(&self) -> PathBuf {
        self.bin_dir.join(self.program)
    }

    /// A call that is not made yet.
    pub fn runner<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Runner {
        let program = self.program();
        let mut runner =
            if self.as_postgres { Runner::as_postgres(program) } else { Runner::as_self(program) };
        for (key, value) in &self.environment {
            runner = runner.env(key, value);
        }
        if let Some(archive) = &self.archive {
            runner = runner.arg("--archive").arg(archive);
        }
        if let Some(cluster) = &self.cluster {
            runner = runner.args(["--cluster", cluster]);
        }
        runner.current_dir(&self.current_dir).args(args)
    }

    /// Calls it; the status is the caller's to judge.
    #[track_caller]
    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Output {
        self.runner(args).run()
    }

    /// Calls it and panics, with all it wrote, unless it exits 0.
    #[track_caller]
    pub fn ok<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Output {
        self.run(args).assert_ok()
    }

    /// Calls it and panics, with all it wrote, unless it exits with this status.
    #[track_caller]
    pub fn fails<I: IntoIterator<Item: AsRef<OsStr>>>(&self, status: i32, args: I) -> Output {
        self.run(args).assert_status(status)
    }

    /// Calls it with `--json` and panics unless it exits 0 and prints one document.
    #[track_caller]
    pub fn json<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Value {
        self.json_with_status(0, args)
    }

    /// Calls it with `--json` and panics unless it exits with this status and prints one document.
    #[track_caller]
    pub fn json_with_status<I: IntoIterator<Item: AsRef<OsStr>>>(&self, status: i32, args: I) -> Value {
        let out = self.runner(args).arg("--json").run().assert_status(status);
        serde_json::from_str(&out.stdout)
            .unwrap_or_else(|e| panic!("not a JSON document: {e}\n{}", out.describe()))
    }

    /// Starts it and leaves it running.
    #[track_caller]
    pub fn spawn<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Background {
        self.runner(args).spawn(&self.scratch, self.program)
    }

    /// What postgresql.conf needs as archive_command to ship with this binary, archive and cluster.
    pub fn archive_command(&self) -> String {
        format!("{} push %p", self.shell_prefix())
    }

    /// What postgresql.conf needs as restore_command.
    pub fn restore_command(&self) -> String {
        format!("{} fetch %f %p", self.shell_prefix())
    }

    fn shell_prefix(&self) -> String {
        let mut words = vec![self.bin_dir.join("waltide").display().to_string()];
        if let Some(archive) = &self.archive {
            words.extend(["--archive".to_owned(), archive.to_string_lossy().into_owned()]);
        }
        if let Some(cluster) = &self.cluster {
            words.extend(["--cluster".to_owned(), cluster.clone()]);
        }
        words.join(" ")
    }
}

/// target/<profile>/<name>, seen from a test in target/<profile>/deps.
#[track_caller]
fn built_binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a process knows its file");
    let found = test.ancestors().skip(1).take(3).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "no built `{name}` beside {}: run `cargo build -p waltide` first, as scripts/test does",
            test.display()
        )
    })
}

/// A hard link where possible, else a copy. The copy is left to cp: a file that this process has open for
/// writing while another thread starts a child could not be executed until that child has closed it.
fn install(from: &Path, to: &Path) {
    let mode = fs::metadata(from).expect("it was found").permissions().mode();
    if mode & 0o005 == 0o005 && fs::hard_link(from, to).is_ok() {
        return;
    }
    Runner::as_self("cp").arg("--").arg(from).arg(to).run().assert_ok();
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).expect("we made it");
}
