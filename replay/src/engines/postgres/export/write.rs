//! Reads tables out of the server, and writes the file: beside its name first, so that a reader never sees half of it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use futures_util::TryStreamExt as _;
use rustix::fs::{CWD, RenameFlags};
use tokio_postgres::Client;
use waltide_format::Oid;
use waltide_format::engines::postgres::catalogue::TableName;

use super::{ExportError, Stored};
use crate::engines::postgres::install::Installation;

/// As much of a program's words as is worth telling.
const SAID_LINES: usize = 20;

fn local(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    let path = path.to_owned();
    move |source| ExportError::Local { doing, path, source }
}

/// Refuses a file that is there, unless it may be replaced, and one that cannot be.
pub(super) fn check(path: &Path, force: bool) -> Result<(), ExportError> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(local("look at", path)(e)),
        Ok(about) if about.is_dir() || !force => return Err(ExportError::Exists { path: path.to_owned() }),
        Ok(_) => {}
    }
    let dir = directory(path);
    let about = fs::metadata(&dir).map_err(local("find", &dir))?;
    match about.is_dir() && path.file_name().is_some() {
        true => Ok(()),
        false => Err(local("write", path)(io::ErrorKind::NotADirectory.into())),
    }
}

fn directory(path: &Path) -> PathBuf {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// A file on its way; removed where it does not come to its end.
#[derive(Debug)]
pub(super) struct Output {
    path: PathBuf,
    unfinished: PathBuf,
    file: File,
}

impl Output {
    /// Begins the file, beside its name.
    pub(super) fn create(path: &Path) -> Result<Self, ExportError> {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".waltide-{}", std::process::id()));
        let unfinished = directory(path).join(name);
        let file = File::options().write(true).create_new(true).mode(0o600).open(&unfinished);
        let file = file.map_err(local("create", &unfinished))?;
        Ok(Self { path: path.to_owned(), unfinished, file })
    }

    /// Makes it durable and gives it its name; its bytes.
    pub(super) fn finish(&self, force: bool) -> Result<u64, ExportError> {
        self.file.sync_all().map_err(local("sync", &self.unfinished))?;
        let bytes = self.file.metadata().map_err(local("look at", &self.unfinished))?.len();
        let flags = if force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        let renamed = rustix::fs::renameat_with(CWD, &self.unfinished, CWD, &self.path, flags);
        match renamed {
            Err(rustix::io::Errno::EXIST) => return Err(ExportError::Exists { path: self.path.clone() }),
            // Not every file system can refuse to replace; a second name can.
            Err(rustix::io::Errno::INVAL) if !force => {
                fs::hard_link(&self.unfinished, &self.path).map_err(|e| match e.kind() {
                    io::ErrorKind::AlreadyExists => ExportError::Exists { path: self.path.clone() },
                    _ => local("write", &self.path)(e),
                })?;
            }
            renamed => renamed.map_err(|e| local("write", &self.path)(e.into()))?,
        }
        let dir = directory(&self.path);
        File::open(&dir).and_then(|d| d.sync_all()).map_err(local("sync", &dir))?;
        Ok(bytes)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // It is not there under this name any more once it is finished.
        let _ = fs::remove_file(&self.unfinished);
    }
}

/// The program that writes SQL.
pub(super) fn pg_dump(install: &Installation) -> Result<PathBuf, ExportError> {
    let program = "pg_dump";
    install.program(program).ok_or_else(|| ExportError::NoProgram { program, bin: install.bin().to_owned() })
}

/// Runs a program that writes the file.
pub(super) async fn run(mut command: Command, output: &Output) -> Result<(), ExportError> {
    let program = PathBuf::from(command.get_program());
    let file = output.file.try_clone().map_err(local("write", &output.unfinished))?;
    command.stdout(file).stderr(Stdio::piped());
    let ran = tokio::task::spawn_blocking(move || command.output()).await;
    let ran = ran.expect("running a program does not panic").map_err(local("run", &program))?;
    if ran.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&ran.stderr).into_owned();
    let lines: Vec<_> = text.lines().collect();
    let said = lines.get(lines.len().saturating_sub(SAID_LINES)..).unwrap_or_default().join("\n");
    Err(ExportError::Program { status: ran.status, said })
}

/// Writes a table, or its partitions one after the other, as COPY does.
pub(super) async fn csv(
    client: &Client,
    root: Oid,
    tables: &[&Stored],
    output: &Output,
) -> Result<(), ExportError> {
    // Partitions have their columns in orders of their own, and generated ones are not data.
    let sql = format!(
        "select attname::text from pg_attribute where attrelid = {root} and attnum > 0 and not attisdropped
             and attgenerated = '' order by attnum"
    );
    let columns = client.query(&sql, &[]).await?;
    let columns: Vec<_> = columns.iter().map(|row| quoted(row.get(0))).collect();
    let columns = if columns.is_empty() { String::new() } else { format!(" ({})", columns.join(", ")) };
    let mut file = &output.file;
    for (i, table) in tables.iter().filter(|t| t.kind == "r").enumerate() {
        let from = format!("{}{columns}", qualified(&table.name));
        let copy = format!("copy {from} to stdout (format csv, header {})", i == 0);
        let mut rows = std::pin::pin!(client.copy_out(&copy).await?);
        while let Some(bytes) = rows.try_next().await? {
            file.write_all(&bytes).map_err(local("write", &output.unfinished))?;
        }
    }
    Ok(())
}

/// An identifier in double quotes, which pg_dump takes literally too.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A table's name in its database.
pub(super) fn qualified(name: &TableName) -> String {
    format!("{}.{}", quoted(&name.schema), quoted(&name.table))
}

/// A database as libpq's keyword: a bare name could be read as a whole string of them.
pub(super) fn dbname(name: &str) -> String {
    format!("--dbname=dbname='{}'", name.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_replaced_and_nothing_half_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.sql");
        let output = Output::create(&path).unwrap();
        (&output.file).write_all(b"one").unwrap();
        assert_eq!(output.finish(false).unwrap(), 3);
        drop(output);
        let error = check(&path, false).unwrap_err().to_string();
        let hint = "hint: name another file, or replace it with --force";
        assert_eq!(error, format!("{} is already there\n{hint}", path.display()));
        check(&path, true).unwrap();
        check(dir.path(), true).unwrap_err();
        check(&dir.path().join("none/out.sql"), true).unwrap_err();
        // Somebody else wrote it while we did.
        let second = Output::create(&path).unwrap();
        (&second.file).write_all(b"other").unwrap();
        assert!(matches!(second.finish(false), Err(ExportError::Exists { .. })));
        drop(second);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        let third = Output::create(&path).unwrap();
        (&third.file).write_all(b"third").unwrap();
        third.finish(true).unwrap();
        drop(third);
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn names_are_taken_literally() {
        assert_eq!(quoted("a*\"b"), "\"a*\"\"b\"");
        assert_eq!(dbname("it's=\\"), "--dbname=dbname='it\\'s=\\\\'");
    }
}
