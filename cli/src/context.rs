//! What a command works with: the archive, the cluster in it, how to answer.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use waltide_archiver::catalog::{self, CatalogError};
use waltide_format::archive::{BackupEntry, Catalog, Envelope, Layout, ObjectKind, WaltideInfo};
use waltide_format::{BackupId, SystemId};
use waltide_storage::{Archive, ArchiveUrl, CatalogueCache, NoProgress, Progress};

use crate::args::Global;
use crate::config::{Config, parse_dotenv};
use crate::exit::Failure;
use crate::progress::Bars;

/// No JSON object of an archive is larger.
const JSON_BYTES_MAX: u64 = 1 << 20;
/// The cluster that is meant where none is named.
const DEFAULT_CLUSTER: &str = "main";

/// Flags, environment and configuration, each beating the next.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    pub(crate) threads: usize,
    pub(crate) config: Config,
    /// The configuration file that was read, if any.
    pub(crate) config_path: Option<PathBuf>,
    archive: Option<String>,
    cluster: Option<String>,
    /// The system identifier asked for.
    pub(crate) system: Option<SystemId>,
    cache: Option<PathBuf>,
    archive_id: OnceLock<String>,
    dotenv: BTreeMap<String, String>,
}

impl Context {
    pub(crate) fn new(global: &Global) -> Result<Self, Failure> {
        let variable = std::env::var_os("WALTIDE_CONFIG").filter(|path| !path.is_empty());
        let named = global.config.clone().or_else(|| variable.map(PathBuf::from));
        // What cannot be read must not pass for what is not set.
        for name in ["WALTIDE_ARCHIVE", "WALTIDE_CLUSTER", "WALTIDE_THREADS"] {
            if let Err(std::env::VarError::NotUnicode(_)) = std::env::var(name) {
                return Err(Failure::usage(format!("{name} is not UTF-8")));
            }
        }
        let (config, config_path) = Config::load(named.as_deref())?;
        let dotenv = match config.dotenv {
            true => std::fs::read_to_string(".env").map(|text| parse_dotenv(&text)).unwrap_or_default(),
            false => BTreeMap::new(),
        };
        let mut context = Self {
            json: global.json,
            quiet: global.quiet,
            threads: 1,
            archive: None,
            cluster: None,
            system: global.system,
            cache: global.cache.clone().or_else(|| config.cache.clone()),
            archive_id: OnceLock::new(),
            config,
            config_path,
            dotenv,
        };
        context.archive = global
            .archive
            .clone()
            .or_else(|| context.env("WALTIDE_ARCHIVE"))
            .or_else(|| context.config.archive.clone());
        context.cluster = global
            .cluster
            .clone()
            .or_else(|| context.env("WALTIDE_CLUSTER"))
            .or_else(|| context.config.cluster.clone());
        context.threads = match (global.threads, context.env("WALTIDE_THREADS"), context.config.threads) {
            (Some(n), _, _) => n,
            (None, Some(text), _) => text
                .parse()
                .map_err(|_| Failure::usage(format!("WALTIDE_THREADS is {text:?}, not a number")))?,
            (None, None, Some(n)) => n,
            (None, None, None) => std::thread::available_parallelism().map_or(1, usize::from),
        };
        if !(1..=1024).contains(&context.threads) {
            return Err(Failure::usage(format!("--threads {} is not between 1 and 1024", context.threads)));
        }
        Ok(context)
    }

    /// A variable of the environment, or of the `.env` that the configuration file asks for.
    pub(crate) fn env(&self, name: &str) -> Option<String> {
        std::env::var(name).ok().or_else(|| self.dotenv.get(name).cloned()).filter(|v| !v.is_empty())
    }

    /// The archive's address, opened or not.
    pub(crate) fn archive_url(&self) -> Result<ArchiveUrl, Failure> {
        let text = self.archive.as_deref().ok_or_else(|| {
            Failure::usage("no archive is named")
                .hint("say --archive URL, or set WALTIDE_ARCHIVE, or put it in the configuration file")
        })?;
        text.parse().map_err(|e| Failure::usage(format!("{e}")))
    }

    /// The data directory that a flag or the configuration file names.
    pub(crate) fn data_dir(&self, flag: Option<PathBuf>) -> Result<PathBuf, Failure> {
        flag.or_else(|| self.config.data_dir.clone()).ok_or_else(|| {
            Failure::usage("no data directory is named")
                .hint("say --data-dir DIR, or put data_dir in the configuration file")
        })
    }

    /// The names of the cluster's objects.
    pub(crate) fn layout(&self) -> Result<Layout, Failure> {
        let name = self.cluster.as_deref().unwrap_or(DEFAULT_CLUSTER);
        Layout::new(name).ok_or_else(|| {
            Failure::usage(format!("{name:?} cannot be a cluster's name"))
                .hint("use letters, digits, '_', '-' and '.', 63 at the most, not starting with a dot")
        })
    }

    /// The arguments that make another run of this program mean the same archive, cluster and configuration.
    pub(crate) fn own_arguments(&self) -> Result<Vec<String>, Failure> {
        let (url, layout) = (self.archive_url()?.to_string(), self.layout()?);
        let mut arguments = vec!["--archive".into(), url, "--cluster".into(), layout.cluster().to_owned()];
        if let Some(path) = &self.config_path {
            let path =
                path.to_str().ok_or_else(|| Failure::usage("the configuration file's path is not UTF-8"))?;
            arguments.extend(["--config".into(), path.to_owned()]);
        }
        Ok(arguments)
    }

    /// The archive, once its own object says that it is one and of a version that is known.
    pub(crate) async fn archive(&self) -> Result<Archive, Failure> {
        let archive = Archive::open(&self.archive_url()?).await?;
        let path = Layout::WALTIDE_JSON;
        let object = archive.get(path, JSON_BYTES_MAX).await.map_err(|e| match e.is_not_found() {
            true => Failure::failed("this is no Waltide archive", e)
                .hint("make one with `waltide init --data-dir DIR`"),
            false => e.into(),
        })?;
        let info: WaltideInfo = Envelope::open_json(&object, ObjectKind::Json)
            .map_err(|e| Failure::damaged(format!("{path} of {} is damaged", archive.url()), e))?;
        if info.format_version != 1 {
            let text = format!(
                "{} follows format version {}, this program knows 1",
                archive.url(),
                info.format_version
            );
            return Err(Failure::message(1, text).hint("use a newer waltide"));
        }
        self.archive_id.get_or_init(|| info.archive_id);
        Ok(archive)
    }

    /// What the archive holds for the cluster, out of the cache where that knows it.
    pub(crate) async fn catalog(&self, archive: &Archive, layout: &Layout) -> Result<Catalog, Failure> {
        let cache = self.cache(archive);
        let loaded = catalog::load(archive, layout, self.system, cache.as_ref(), self.threads).await;
        loaded.map_err(catalog_failure)
    }

    /// The catalogue cache, unless it is turned off.
    pub(crate) fn cache(&self, archive: &Archive) -> Option<CatalogueCache> {
        self.cache_path(archive).map(|path| CatalogueCache::open(&path))
    }

    /// The cache's file: `--cache`, the configuration's, or one of the user's own; none where that is empty.
    pub(crate) fn cache_path(&self, archive: &Archive) -> Option<PathBuf> {
        match &self.cache {
            Some(path) if path.as_os_str().is_empty() => None,
            Some(path) => Some(path.clone()),
            None => catalog::default_cache_path(archive.url(), self.archive_id.get()?),
        }
    }

    /// Bars on a terminal, nothing elsewhere.
    pub(crate) fn progress(&self) -> Arc<dyn Progress> {
        use std::io::IsTerminal as _;
        match !self.quiet && std::io::stderr().is_terminal() {
            true => Arc::new(Bars::new()),
            false => Arc::new(NoProgress),
        }
    }
}

/// Why there is no catalogue, and what to do about it.
pub(crate) fn catalog_failure(e: CatalogError) -> Failure {
    let status = if e.is_damage() { 3 } else { 1 };
    let hint = match e {
        CatalogError::NoCluster { .. } => "name it with --cluster, or make it with `waltide init`",
        CatalogError::Damaged { .. } => "it is small and never changes: put a copy of it back",
        _ => return Failure::from(e),
    };
    Failure::from(e).status(status).hint(hint)
}

/// The backup that `text` names: an id, the beginning of one, or `latest`.
pub(crate) fn find_backup<'a>(catalog: &'a Catalog, text: &str) -> Result<&'a BackupEntry, Failure> {
    let named = |b: &&BackupEntry| b.head.id.as_str().starts_with(text);
    let mut found = catalog.backups.iter().filter(named);
    let backup = match text {
        "latest" => catalog.backups.iter().max_by_key(|b| b.head.stopped),
        "" => None,
        _ => found.next(),
    };
    let Some(backup) = backup else {
        let text = format!("cluster {} has no backup {text}", catalog.cluster);
        return Err(Failure::message(1, text).hint("`waltide list` shows which there are"));
    };
    match found.next() {
        Some(other) if text != "latest" => {
            let ids = format!("{} and {}", backup.head.id, other.head.id);
            Err(Failure::usage(format!("{text} is the beginning of {ids}; say more of it")))
        }
        _ => Ok(backup),
    }
}

/// The backup that a plan is to start from, if one is named. Of a whole id the plan itself says why it is none.
pub(crate) fn named_backup(catalog: &Catalog, text: Option<&str>) -> Result<Option<BackupId>, Failure> {
    let Some(text) = text else { return Ok(None) };
    match text.parse() {
        Ok(id) => Ok(Some(id)),
        Err(_) => find_backup(catalog, text).map(|backup| Some(backup.head.id.clone())),
    }
}
