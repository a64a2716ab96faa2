//! `waltide init` on real clusters.

use waltide_tests::{Cluster, Scratch, StopMode, Waltide};

#[test]
fn init_works_with_the_server_stopped_or_running_and_twice() {
    let scratch = Scratch::new("init");
    let archive = scratch.join("it's an archive");
    let waltide = Waltide::new(&scratch).archive(&archive);
    let mut cluster = Cluster::builder("db").scratch(&scratch).create();
    let data_dir = cluster.data_dir().display().to_string();

    scratch.give_tree(scratch.path());
    let made = waltide.json(["init", "--data-dir", &data_dir]);
    assert_eq!(
        (&made["archive_json"], &made["cluster_json"], &made["system_json"]),
        (&"created".into(), &"created".into(), &"created".into())
    );
    assert_eq!((&made["major"], &made["segment_size"]), (&15.into(), &(1 << 20).into()));
    assert_eq!(made["settings"]["archive_mode"], "on");
    let again = waltide.json(["init", "--data-dir", &data_dir]);
    assert_eq!((&again["archive_json"], &again["system_json"]), (&"existing".into(), &"existing".into()));
    assert_eq!(again["system_id"], made["system_id"]);
    let inside = cluster.data_dir().join("archive");
    let refused = waltide.clone().archive(&inside).fails(1, ["init", "--data-dir", &data_dir]);
    assert!(refused.stderr.contains("lies in the data directory"), "{}", refused.describe());
    assert!(!inside.exists());
    // PostgreSQL could not write into an archive that root made for itself.
    let foreign =
        waltide.clone().as_self().archive(scratch.join("foreign")).ok(["init", "--data-dir", &data_dir]);
    let is_root = rustix::process::geteuid().is_root();
    assert_eq!(foreign.stderr.contains("give it the archive (chown -R)"), is_root, "{}", foreign.stderr);
    assert!(!waltide.ok(["init", "--data-dir", &data_dir]).stderr.contains("chown"));

    // What a configuration file says holds for the server's pushes, too.
    let config = scratch.join("100 % of it.toml");
    std::fs::write(&config, "compression_level = 5\n").unwrap();
    let config = config.display().to_string();
    let named = waltide.json(["--config", &config, "init", "--data-dir", &data_dir]);
    let command = named["archive_command"].as_str().unwrap();
    assert!(command.contains(&format!("--config '{}' push %p", config.replace('%', "%%"))), "{command}");

    // What is printed can be put into postgresql.conf as it is.
    let text = waltide.ok(["init", "--data-dir", &data_dir]).stdout;
    let conf: Vec<&str> = text.lines().filter(|line| line.contains(" = '")).collect();
    assert_eq!(conf.len(), 4, "{text}");
    let path = cluster.data_dir().join("postgresql.conf");
    let old = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{old}\n{}\n", conf.join("\n"))).unwrap();
    cluster.start();
    assert_eq!(cluster.query("show archive_mode"), "on");
    assert_eq!(cluster.query("show archive_timeout"), "1min");
    assert_eq!(cluster.query("show archive_command"), made["archive_command"].as_str().unwrap());
    std::fs::write(&path, old).unwrap();

    // The running server is told, and says what needs a restart.
    cluster.restart();
    assert_eq!(cluster.query("show archive_mode"), "off");
    let connection = cluster.connection();
    let apply = ["init", "--data-dir", &data_dir, "--apply", "--connection", &connection];
    let applied = waltide.json(apply);
    assert_eq!(applied["applied"]["written_to"], "ALTER SYSTEM");
    assert_eq!(applied["applied"]["restart_needed_for"], serde_json::json!(["archive_mode"]));
    cluster.restart();
    assert_eq!(cluster.query("show archive_mode"), "on");
    assert_eq!(cluster.query("show archive_command"), made["archive_command"].as_str().unwrap());
    assert_eq!(waltide.json(apply)["applied"]["changed"], serde_json::json!([]));

    // A stopped one finds the same in its files.
    cluster.query("alter system reset all");
    cluster.stop(StopMode::Fast);
    let applied = waltide.json(["init", "--data-dir", &data_dir, "--apply"]);
    assert!(applied["applied"]["written_to"].as_str().unwrap().ends_with("postgresql.auto.conf"));
    cluster.start();
    assert_eq!(cluster.query("show archive_mode"), "on");
    assert_eq!(cluster.query("show archive_command"), made["archive_command"].as_str().unwrap());
}

#[test]
fn another_database_does_not_get_into_the_cluster_unless_it_was_upgraded() {
    let scratch = Scratch::new("init-other");
    let waltide = Waltide::new(&scratch).archive(scratch.dir("archive"));
    let one = Cluster::builder("one").scratch(&scratch).create();
    let two = Cluster::builder("two").scratch(&scratch).create();
    let dir = |cluster: &Cluster| cluster.data_dir().display().to_string();
    let first = waltide.json(["init", "--data-dir", &dir(&one)]);
    let refused = waltide.fails(1, ["init", "--data-dir", &dir(&two)]);
    let known = first["system_id"].as_str().unwrap();
    assert!(
        refused.stderr.contains(&format!("is another database: it has system identifier {known}")),
        "{refused:?}"
    );
    let second = waltide.json(["init", "--data-dir", &dir(&two), "--upgrade"]);
    assert_eq!((&second["cluster_json"], &second["system_json"]), (&"existing".into(), &"created".into()));
    // Both are known from now on.
    waltide.ok(["init", "--data-dir", &dir(&one)]);

    let nothing = waltide.fails(1, ["init", "--data-dir", "/nonexistent"]);
    assert!(nothing.stderr.contains("/nonexistent/PG_VERSION cannot be read"), "{nothing:?}");
    std::fs::write(one.data_dir().join("PG_VERSION"), "12\n").unwrap();
    let old = waltide.fails(1, ["init", "--data-dir", &dir(&one)]);
    assert!(
        old.stderr.contains("is of PostgreSQL 12, which is not one of the supported majors 13 to 18"),
        "{old:?}"
    );
}
