-- Makes WAL of every resource manager of PostgreSQL 15 and of most kinds of record they have.
--
-- Needs track_commit_timestamp = on and max_prepared_transactions > 0 (workload.rs, EVERY_RMGR_SETTINGS), a
-- superuser, the contrib modules, and to be run statement by statement (psql), once per cluster. The
-- variable `tablespace`, if given, is an empty directory for a tablespace; without it the tablespace lies
-- in pg_tblspc.

create schema rmgr;
set search_path = rmgr, public;

-- XLOG: checkpoints, a restore point, full-page images from hint bits (with checksums) and index builds.
checkpoint;
select pg_create_restore_point('every-rmgr');

-- Heap: insert, update, hot update, delete, lock, truncate, speculative insert. Transaction: commit with
-- dropped relations, abort, subtransactions, two-phase.
create table heap (id int primary key, k int, filler text) with (fillfactor = 70);
insert into heap select i, i % 10, repeat('x', 100) from generate_series(1, 2000) i;
update heap set filler = 'hot' where id % 7 = 0;
update heap set id = id + 100000 where id % 11 = 0;
delete from heap where id % 13 = 0;
select count(*) from (select 1 from heap where k = 3 for update) locked;
insert into heap values (1, 1, 'again'), (1, 1, 'again'), (5000, 1, 'new')
    on conflict (id) do nothing;
begin;
insert into heap values (5001, 0, 'undone');
rollback;
create table doomed (x int);
insert into doomed select generate_series(1, 100);
begin;
truncate doomed;
rollback;
truncate doomed;
drop table doomed;

create table twophase (x int);
begin;
insert into twophase values (1);
prepare transaction 'kept';
begin;
insert into twophase values (2);
create table undone_twophase (x int);
prepare transaction 'undone';
checkpoint;
commit prepared 'kept';
rollback prepared 'undone';

-- Values that leave the page.
create table toasted (id int, big text);
alter table toasted alter column big set storage external;
insert into toasted select i, repeat(md5(i::text), 500) from generate_series(1, 20) i;
update toasted set big = repeat('y', 20000) where id % 3 = 0;

-- Heap2: multi-insert, prune, freeze, visibility bits, vacuum of line pointers.
copy heap (id, k, filler) from program 'seq 10001 10500 | sed ''s/$/,4,copied/''' with (format csv);
vacuum heap;
vacuum (freeze, index_cleanup on) heap;
update heap set filler = 'after the bits' where id between 300 and 320;
vacuum full heap;
cluster heap using heap_pkey;

-- Storage: creation and truncation of files.
delete from heap where id > 1000;
vacuum heap;

-- Btree: splits in order and out of it, duplicates, page deletion and reuse.
create table tree (k int, t text);
create index tree_k on tree (k);
create unique index tree_kt on tree (t, k);
insert into tree select i, md5(i::text) from generate_series(1, 5000) i;
insert into tree select 42, 'same ' || i from generate_series(1, 1000) i;
delete from tree where k between 1000 and 4500;
vacuum tree;
vacuum tree;
insert into tree select i, md5(i::text) from generate_series(1000, 2500) i;

-- Hash: growth of the table, overflow pages, squeezing, deletion.
create table hashed (k int);
create index hashed_k on hashed using hash (k);
insert into hashed select i from generate_series(1, 3000) i;
insert into hashed select 7 from generate_series(1, 2000);
delete from hashed where k = 7 or k % 3 = 0;
vacuum hashed;
insert into hashed select i from generate_series(4000, 6000) i;

-- Gin: the pending list, its clean-up, posting trees and their vacuum.
create table gin (id int, words text[]);
create index gin_words on gin using gin (words) with (fastupdate = on);
insert into gin select i, array['all', 'w' || i % 50, 'u' || i] from generate_series(1, 3000) i;
select gin_clean_pending_list('gin_words');
create index gin_slow on gin using gin (words) with (fastupdate = off);
insert into gin select i, array['all', 'w' || i % 50] from generate_series(3001, 3500) i;
delete from gin where id % 4 <> 0;
vacuum gin;
vacuum gin;

-- Gist: splits, deletion.
create table gist (p point);
create index gist_p on gist using gist (p);
insert into gist select point(i % 100, i / 100) from generate_series(1, 4000) i;
update gist set p = point(p[1], p[0]) where p[0] < 20;
delete from gist where p[0] < 90;
vacuum gist;
vacuum gist;

-- SPGist: text (prefixes) and points (quadrants), vacuum.
create table spgist (t text, p point);
create index spgist_t on spgist using spgist (t);
create index spgist_p on spgist using spgist (p);
insert into spgist select 'common/prefix/' || md5(i::text), point(i % 71, i % 97) from generate_series(1, 3000) i;
delete from spgist where p[0] > 20;
vacuum spgist;
insert into spgist select 'other/' || i, point(i, -i) from generate_series(1, 500) i;

-- BRIN: summaries, updates in place and elsewhere, desummarising.
create table brin (k int, filler text);
create index brin_k on brin using brin (k) with (pages_per_range = 1, autosummarize = off);
insert into brin select i, repeat('z', 200) from generate_series(1, 2000) i;
select brin_summarize_new_values('brin_k');
insert into brin select -i, repeat('z', 200) from generate_series(1, 100) i;
update brin set k = k * 1000 where k % 5 = 0;
select brin_desummarize_range('brin_k', 0);
select brin_summarize_range('brin_k', 0);
create table brin_wide (t text);
create index brin_wide_t on brin_wide using brin (t) with (pages_per_range = 1);
insert into brin_wide select repeat(md5(i::text), 20) from generate_series(1, 300) i;
select brin_summarize_new_values('brin_wide_t');
update brin_wide set t = repeat(t, 2);
select brin_summarize_new_values('brin_wide_t');

-- Generic: bloom, whose pages are logged by their difference.
create extension bloom;
create table bloomed (a int, b int);
create index bloomed_ab on bloomed using bloom (a, b);
insert into bloomed select i, i * 7 from generate_series(1, 2000) i;
delete from bloomed where a % 2 = 0;
vacuum bloomed;

-- Sequence.
create sequence counter;
select count(nextval('counter')) from generate_series(1, 200);
select setval('counter', 9000);

-- MultiXact: a row locked by a transaction and updated by its subtransaction has two holders.
create table shared (id int primary key, x int);
create table child (id int references shared);
insert into shared select i, 0 from generate_series(1, 50) i;
begin;
select count(*) from (select 1 from shared for key share) held;
savepoint a;
update shared set x = 1 where id % 2 = 0;
savepoint b;
select count(*) from (select 1 from shared where id % 2 = 1 for update) held;
rollback to savepoint b;
commit;
begin;
select count(*) from (select 1 from shared where id < 10 for share) held;
savepoint a;
delete from shared where id < 5;
commit;
vacuum shared;

-- Standby: exclusive locks, running transactions. Invalidations come with the table definitions.
begin;
lock table shared in access exclusive mode;
select pg_current_xact_id() is not null;
commit;
checkpoint;

-- RelMap: a catalogue that finds its file through the relation map gets a new one.
vacuum full pg_class;
reindex table pg_catalog.pg_type;

-- Unlogged relations and their init forks; a change of persistence.
create unlogged table unlogged (x int primary key);
insert into unlogged select generate_series(1, 500);
alter table unlogged set logged;
alter table shared drop constraint shared_pkey cascade;
create unlogged table stays_unlogged (x int primary key);
insert into stays_unlogged select generate_series(1, 500);

-- Tablespace.
set allow_in_place_tablespaces = on;
\if :{?tablespace}
create tablespace rmgr_space location :'tablespace';
\else
create tablespace rmgr_space location '';
\endif
create table elsewhere (x int) tablespace rmgr_space;
insert into elsewhere select generate_series(1, 500);
create index elsewhere_x on elsewhere (x) tablespace rmgr_space;
alter table heap set tablespace rmgr_space;

-- Database: both ways of copying one, a move to the other tablespace, dropping.
create database rmgr_wal_log template template0 strategy wal_log;
create database rmgr_file_copy template template0 strategy file_copy;
alter database rmgr_file_copy set tablespace rmgr_space;
create database rmgr_gone template template0 strategy wal_log;
drop database rmgr_gone;

create tablespace rmgr_gone location '';
drop tablespace rmgr_gone;

-- ReplicationOrigin.
select pg_replication_origin_create('rmgr-origin');
select pg_replication_origin_advance('rmgr-origin', '0/1234567');
select pg_replication_origin_create('rmgr-gone');
select pg_replication_origin_advance('rmgr-gone', '0/1');
select pg_replication_origin_drop('rmgr-gone');

-- LogicalMessage: in a transaction and outside, one longer than several pages.
select pg_logical_emit_message(true, 'rmgr', 'in a transaction');
select pg_logical_emit_message(false, 'rmgr', repeat('long', 10000));

-- CLOG and CommitTs: a page of clog holds 32768 transactions, one of commit timestamps 819. Subtransactions
-- are the cheapest; their ids make this commit record 130 kB long.
create table counted (x int);
do $$
begin
    for i in 1 .. 33000 loop
        begin
            insert into counted values (i);
        exception when division_by_zero then
            null;
        end;
    end loop;
end
$$;

-- The rest of this segment stays empty.
select pg_switch_wal() > '0/0';
checkpoint;
