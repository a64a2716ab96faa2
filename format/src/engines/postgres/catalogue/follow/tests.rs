//! A made-up life of tables, told to the follower as a log tells it, against what really happened.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::Index;

use super::super::change::UpdatedBody;
use super::super::events::TableEventKind;
use super::super::fate::Commit;
use super::*;
use crate::reader::Writer;
use crate::time::TimestampTz;

const SPACE: Oid = 1663;
const OTHER_SPACE: Oid = 4711;
const DATABASE: Oid = 5;
const SCHEMA: Oid = 2200;
/// As many rows as a page has room for.
const ROWS_PER_PAGE: u16 = 6;

fn file(catalogue: Catalogue) -> RelFileLocator {
    let (spc_oid, db_oid) = if catalogue == Catalogue::Database { (1664, 0) } else { (SPACE, DATABASE) };
    RelFileLocator { spc_oid, db_oid, rel_number: catalogue.oid() }
}

fn put_name(w: &mut Writer, name: &str) {
    let mut bytes = [0; 64];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    w.bytes(&bytes);
}

/// A row of pg_class as 15 lays it out.
fn class_body(table: &Table, rewrites: Oid) -> Vec<u8> {
    let mut w = Writer::new();
    w.u32(table.oid);
    put_name(&mut w, &table.name);
    w.u32(SCHEMA).bytes(&[0; 16]).u32(table.file).u32(table.tablespace).bytes(&[0; 12]).u32(0).u8(0).u8(0);
    w.u8(b'p').u8(b'r').bytes(&[0; 12]).u32(rewrites).bytes(&[0; 8]);
    w.into_bytes()
}

fn namespace_body() -> Vec<u8> {
    let mut w = Writer::new();
    w.u32(SCHEMA);
    put_name(&mut w, "public");
    w.u32(10);
    w.into_bytes()
}

fn database_body() -> Vec<u8> {
    let mut w = Writer::new();
    w.u32(DATABASE);
    put_name(&mut w, "shop");
    w.bytes(&[0; 12]).u32(u32::MAX).bytes(&[0; 8]).u32(SPACE);
    w.into_bytes()
}

#[derive(Debug, Clone, PartialEq)]
struct Table {
    oid: Oid,
    name: String,
    file: Oid,
    tablespace: Oid,
}

/// What a transaction does to one table.
#[derive(Debug, Clone, Copy)]
enum Act {
    Create,
    Rename(Index),
    Truncate(Index),
    Rewrite(Index),
    /// To another tablespace, or back.
    Move(Index),
    Drop(Index),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => Just(Act::Create),
        1 => any::<Index>().prop_map(Act::Rename),
        1 => any::<Index>().prop_map(Act::Truncate),
        1 => any::<Index>().prop_map(Act::Rewrite),
        1 => any::<Index>().prop_map(Act::Move),
        1 => any::<Index>().prop_map(Act::Drop),
    ]
}

/// The heap of pg_class, and everything that was logged of it.
#[derive(Default)]
struct World {
    heap: BTreeMap<TupleId, HeapTuple>,
    /// The pages as they were before each change.
    past: Vec<BTreeMap<TupleId, HeapTuple>>,
    log: Vec<CatalogueChange>,
    next: u16,
    oids: Oid,
    lsn: u64,
}

impl World {
    fn change(&mut self, xid: u32, kind: ChangeKind) {
        self.past.push(self.heap.clone());
        self.lsn += 8;
        self.log.push(CatalogueChange {
            lsn: self.lsn.into(),
            xid: xid.into(),
            file: file(Catalogue::Class),
            kind,
        });
    }

    fn place(&mut self) -> TupleId {
        let at =
            TupleId { block: u32::from(self.next / ROWS_PER_PAGE), offset: self.next % ROWS_PER_PAGE + 1 };
        self.next += 1;
        at
    }

    fn insert(&mut self, xid: u32, body: Vec<u8>) -> TupleId {
        let at = self.place();
        self.change(xid, ChangeKind::Insert { at, body: body.clone() });
        self.heap.insert(at, row(xid, body));
        at
    }

    fn delete(&mut self, xid: u32, at: TupleId) {
        self.change(xid, ChangeKind::Delete { at });
        self.heap.get_mut(&at).unwrap().xmax = Some(xid.into());
    }

    /// An update as PostgreSQL logs it: without what both versions start and end with.
    fn update(&mut self, xid: u32, old: TupleId, body: Vec<u8>) -> TupleId {
        let before = self.heap[&old].body.clone();
        let same = |a: &mut dyn Iterator<Item = (u8, u8)>| a.take_while(|(a, b)| a == b).count();
        let prefix = same(&mut before.iter().copied().zip(body.iter().copied()));
        let left = body.len() - prefix;
        let suffix = same(&mut before.iter().rev().copied().zip(body.iter().rev().copied())).min(left);
        let middle = body[prefix..body.len() - suffix].to_vec();
        let new = self.place();
        let updated = UpdatedBody { prefix: prefix as u16, suffix: suffix as u16, middle };
        self.change(xid, ChangeKind::Update { old, new, body: Some(updated) });
        self.heap.get_mut(&old).unwrap().xmax = Some(xid.into());
        self.heap.insert(new, row(xid, body));
        new
    }

    fn fresh(&mut self) -> Oid {
        self.oids += 1;
        16_384 + self.oids
    }

    /// The page of a block, as a change or a backup holds it.
    fn page(heap: &BTreeMap<TupleId, HeapTuple>, block: u32) -> ChangeKind {
        let here = heap.iter().filter(|(at, _)| at.block == block);
        ChangeKind::Page { block, tuples: here.map(|(at, tuple)| (at.offset, tuple.clone())).collect() }
    }
}

fn row(xid: u32, body: Vec<u8>) -> HeapTuple {
    HeapTuple { xmin: xid.into(), xmin_hint: Hint::Unknown, xmax: None, xmax_hint: Hint::Unknown, body }
}

/// What happened to a table: in words, by which transaction.
type Told = (String, u32);

/// Where each transaction begins and ends in the log, and whether it commits.
struct Lived {
    world: World,
    ends: Vec<(u32, u64, bool)>,
    told: Vec<(u64, Told)>,
}

fn live(transactions: &[(Vec<Act>, bool)]) -> Lived {
    let mut world = World { lsn: 0x1000, ..World::default() };
    let mut tables: Vec<(Table, TupleId)> = Vec::new();
    let (mut ends, mut told) = (Vec::new(), Vec::new());
    for (number, (acts, commits)) in transactions.iter().enumerate() {
        let xid = 700 + number as u32;
        let before = tables.clone();
        let mut emptied = Vec::new();
        for act in acts {
            let count = tables.len();
            let pick = |index: &Index| (count > 0).then(|| index.index(count.max(1)));
            match act {
                Act::Create => {
                    let oid = world.fresh();
                    let table = Table { oid, name: format!("t{oid}"), file: world.fresh(), tablespace: 0 };
                    let at = world.insert(xid, class_body(&table, 0));
                    tables.push((table, at));
                }
                Act::Rename(index)
                | Act::Truncate(index)
                | Act::Rewrite(index)
                | Act::Move(index)
                | Act::Drop(index) => {
                    let Some(i) = pick(index) else { continue };
                    let (mut table, at) = tables[i].clone();
                    match act {
                        Act::Drop(_) => {
                            world.delete(xid, at);
                            tables.remove(i);
                            continue;
                        }
                        Act::Rename(_) => table.name = format!("r{}", world.fresh()),
                        Act::Truncate(_) => {
                            table.file = world.fresh();
                            emptied.push(table.oid);
                        }
                        Act::Move(_) => {
                            table.file = world.fresh();
                            table.tablespace = if table.tablespace == 0 { OTHER_SPACE } else { 0 };
                        }
                        _ => {
                            // A table of its own gets the new file first, then the two change files.
                            let oid = world.fresh();
                            let (name, file) = (format!("pg_temp_{}", table.oid), world.fresh());
                            let mut other = Table { oid, name, file, tablespace: table.tablespace };
                            let other_at = world.insert(xid, class_body(&other, table.oid));
                            std::mem::swap(&mut table.file, &mut other.file);
                            let at = world.update(xid, at, class_body(&table, 0));
                            let other_at = world.update(xid, other_at, class_body(&other, table.oid));
                            world.delete(xid, other_at);
                            tables[i] = (table, at);
                            continue;
                        }
                    }
                    let at = world.update(xid, at, class_body(&table, 0));
                    tables[i] = (table, at);
                }
            }
        }
        world.lsn += 8;
        ends.push((xid, world.lsn, *commits));
        if !commits {
            tables = before;
            continue;
        }
        let mut say = |text: String| told.push((world.lsn, (text, xid)));
        for (table, _) in &before {
            match tables.iter().map(|(t, _)| t).find(|t| t.oid == table.oid) {
                None => say(format!("{} dropped", table.name)),
                Some(now) => {
                    if now.name != table.name {
                        say(format!("{} renamed to {}", table.name, now.name));
                    }
                    if now.file != table.file {
                        let what = if emptied.contains(&table.oid) { "truncated" } else { "rewritten" };
                        say(format!("{} {what}", table.name));
                    }
                }
            }
        }
        for (table, _) in tables.iter().filter(|(t, _)| !before.iter().any(|(b, _)| b.oid == t.oid)) {
            say(format!("{} created", table.name));
        }
    }
    Lived { world, ends, told }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn every_life_of_tables_is_told_from_any_backup_on(
        transactions in proptest::collection::vec((proptest::collection::vec(act(), 1..5), prop::bool::weighted(0.8)), 1..14),
        start: Index, copied: Index, images in proptest::collection::vec(prop::bool::weighted(0.2), 200),
    ) {
        let Lived { world, ends, told } = live(&transactions);
        // The log begins in front of some change; the pages were copied at any time after that.
        let start = start.index(world.log.len() + 1);
        let copied = start + copied.index(world.log.len() + 1 - start);
        let begin = world.log.get(start).map_or(Lsn::from(world.lsn + 4), |c| c.lsn.saturating_sub(4));
        let heap = |n: usize| world.past.get(n).unwrap_or(&world.heap);

        let mut follower = Follower::new(PgMajor::V15, begin, CatalogueFiles::default());
        let of = |catalogue, kind| CatalogueChange { lsn: begin, xid: Xid::INVALID, file: file(catalogue), kind };
        let frozen = |body| ChangeKind::Page { block: 0, tuples: vec![(1, HeapTuple { xmin_hint: Hint::Committed, ..row(3, body) })] };
        follower.apply(&of(Catalogue::Database, frozen(database_body())));
        follower.apply(&of(Catalogue::Namespace, frozen(namespace_body())));
        let blocks = u32::from(world.next / ROWS_PER_PAGE);
        for block in 0..=blocks {
            follower.apply(&of(Catalogue::Class, World::page(heap(copied), block)));
        }
        // The first record of a page since then has an image of it, as later ones may.
        let mut seen = HashSet::new();
        for (n, change) in world.log.iter().enumerate().skip(start) {
            let places = match &change.kind {
                ChangeKind::Insert { at, .. } | ChangeKind::Delete { at } => vec![*at],
                ChangeKind::Update { old, new, .. } => vec![*new, *old],
                _ => vec![],
            };
            let mut imaged = Vec::new();
            for at in &places {
                if (seen.insert(at.block) || images[n % images.len()]) && !imaged.contains(&at.block) {
                    imaged.push(at.block);
                    follower.apply(&CatalogueChange { kind: World::page(heap(n + 1), at.block), ..change.clone() });
                }
            }
            let kind = match &change.kind {
                ChangeKind::Insert { at, .. } if imaged.contains(&at.block) => continue,
                ChangeKind::Update { old, new, .. } if imaged.contains(&new.block) => ChangeKind::Update { old: *old, new: *new, body: None },
                // Only versions of one page share bytes.
                ChangeKind::Update { old, new, .. } if old.block != new.block => {
                    let middle = heap(n + 1)[new].body.clone();
                    ChangeKind::Update { old: *old, new: *new, body: Some(UpdatedBody { prefix: 0, suffix: 0, middle }) }
                }
                kind => kind.clone(),
            };
            follower.apply(&CatalogueChange { kind, ..change.clone() });
        }
        prop_assert_eq!((follower.unread(), follower.discovered()), (0, &[][..]));

        let mut fates = Fates::default();
        for (xid, lsn, commits) in &ends {
            let xid = Xid::from(*xid);
            if Lsn::from(*lsn) < begin {
                fates.add_before(xid, *commits);
            } else if *commits {
                fates.add(Commit { xid, start: (*lsn).into(), end: (lsn + 8).into(), time: TimestampTz::default() }, &[]);
            }
        }
        let names = follower.finish(&fates);
        let mut found: Vec<Told> = names.table_events().into_iter().map(|e| {
            assert_eq!((e.table.database.as_str(), e.table.schema.as_str(), e.before), ("shop", "public", e.commit.start));
            let what = match e.kind {
                TableEventKind::Created => "created".to_owned(),
                TableEventKind::Renamed { to } => format!("renamed to {}", to.table),
                TableEventKind::Rewritten => "rewritten".to_owned(),
                TableEventKind::Truncated => "truncated".to_owned(),
                TableEventKind::Dropped { .. } => "dropped".to_owned(),
            };
            (format!("{} {what}", e.table.table), e.commit.xid.get())
        }).collect();
        let mut expected: Vec<Told> = told.into_iter().filter(|(lsn, _)| Lsn::from(*lsn) >= begin).map(|(_, t)| t).collect();
        found.sort();
        expected.sort();
        prop_assert_eq!(found, expected);
    }
}
