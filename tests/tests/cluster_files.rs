//! The files of a real cluster, read by us: data pages with their checksums, backup_label, the backup
//! history file.

use std::fs;
use std::path::{Path, PathBuf};

use waltide_format::BLOCK_BYTES;
use waltide_format::engines::postgres::cluster::{
    BackupHistory, BackupLabel, PageState, parse_tablespace_map, verify_page,
};
use waltide_tests::{Cluster, Scratch, StopMode};

/// The files of relations below a directory, with the number of their first block.
fn relation_files(dir: &Path, found: &mut Vec<(PathBuf, u32)>) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            relation_files(&entry.path(), found);
        } else if name.starts_with(|c: char| c.is_ascii_digit()) {
            let segment = name.split_once('.').map_or(0, |(_, segment)| segment.parse::<u32>().unwrap());
            found.push((entry.path(), segment * 131_072));
        }
    }
}

#[test]
fn every_page_of_a_real_cluster_has_the_checksum_we_compute() {
    let mut cluster = Cluster::builder("pages").start();
    cluster.pgbench_init(2);
    cluster.pgbench(&["-t", "200"]).assert_ok();
    cluster.query("vacuum");
    cluster.stop(StopMode::Fast);
    let mut files = Vec::new();
    for dir in ["base", "global"] {
        relation_files(&cluster.data_dir().join(dir), &mut files);
    }
    let mut valid = 0;
    for (path, first) in files {
        let bytes = fs::read(&path).unwrap();
        let (pages, rest) = bytes.as_chunks::<BLOCK_BYTES>();
        assert!(rest.is_empty(), "{}", path.display());
        for (block, page) in (first..).zip(pages) {
            let state = verify_page(page, block, true);
            assert!(
                matches!(state, PageState::Valid | PageState::New),
                "{} {block}: {state:?}",
                path.display()
            );
            valid += u32::from(state == PageState::Valid);
            let mut flipped = *page;
            flipped[block as usize % BLOCK_BYTES] ^= 0x10;
            assert!(!matches!(verify_page(&flipped, block, true), PageState::Valid | PageState::New));
        }
    }
    assert!(valid > 3000, "{valid}");
}

#[test]
fn the_label_of_a_real_backup_is_read() {
    let scratch = Scratch::new("label");
    let archive = scratch.dir("archive");
    let command = format!("cp %p {}/%f", archive.display());
    let cluster = Cluster::builder("db").scratch(&scratch).archive_command(&command).start();
    let space = cluster.create_tablespace("other");
    cluster.query("create table t (x int) tablespace other");
    let tars = cluster.base_backup("tars", &["-Ft", "-l", "nightly: the second"]);
    let of_tar = |file: &str| {
        let tar = tars.join("base.tar");
        let out = waltide_tests::Runner::as_self("tar").arg("-xOf").arg(tar).arg(file).run().assert_ok();
        out.stdout
    };
    let text = of_tar("backup_label");
    let label = BackupLabel::parse(&text).unwrap();
    assert_eq!((label.label.as_str(), label.method.as_str()), ("nightly: the second", "streamed"));
    assert_eq!((label.from_standby, label.timeline.get(), label.incremental_from), (false, 1, None));
    assert_eq!(label.to_text(), text);
    let map = parse_tablespace_map(&of_tar("tablespace_map")).unwrap();
    assert_eq!(map.iter().map(|(_, path)| Path::new(path)).collect::<Vec<_>>(), [space.as_path()]);

    cluster.archive_all();
    let mut names = fs::read_dir(&archive).unwrap().map(|e| e.unwrap().path());
    let history = names.find(|path| path.extension().is_some_and(|e| e == "backup")).unwrap();
    let h = BackupHistory::parse(&fs::read(history).unwrap()).unwrap();
    assert_eq!(
        (h.start_lsn, h.checkpoint_lsn, h.start_segment),
        (label.start_lsn, label.checkpoint_lsn, label.start_segment)
    );
    assert!(h.stop_lsn > h.start_lsn && h.stop_timeline == Some(label.timeline));
    assert_eq!(h.label, label.label);
}
