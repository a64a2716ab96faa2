#!/usr/bin/env bash
# Makes the golden segments of one major version: tests/golden/wal/<major>/.
#
#   tests/golden/wal/make.sh BIN_DIR      as a user PostgreSQL runs as; psql and zstd are taken from PATH
#
# Segments are never made again once they are committed: they stand for what that version wrote.
set -euo pipefail

bin=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap '"$bin/pg_ctl" -D "$work/data" -m immediate stop >/dev/null 2>&1 || true; rm -rf "$work"' EXIT

"$bin/initdb" -D "$work/data" -U postgres -A trust -E UTF8 --locale=C --no-sync --wal-segsize=1 --data-checksums >/dev/null
major=$(cat "$work/data/PG_VERSION")
cat >>"$work/data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
fsync = off
autovacuum = off
wal_level = logical
wal_compression = on
max_prepared_transactions = 10
track_commit_timestamp = on
timezone = 'UTC'
bgwriter_lru_maxpages = 0
wal_keep_size = 1GB
CONF
"$bin/pg_ctl" -D "$work/data" -l "$work/log" -w start >/dev/null
sql() { psql -X -q -A -t -v ON_ERROR_STOP=1 -h "$work" -U postgres -d postgres "$@"; }

sql <<SQL
create table t (id int primary key, filler text) with (fillfactor = 60);
insert into t select i, repeat('x', 60) from generate_series(1, 400) i;
create table doomed (x int primary key);
insert into doomed select generate_series(1, 10);
create sequence counter;
vacuum (freeze) t;
SQL
if [ "$major" -ge 15 ]; then
    sql -c 'create extension pg_walinspect'
fi
sql -c 'select pg_switch_wal()' >/dev/null
first_lsn=$(sql -c "select pg_create_restore_point('start')")
first=$(sql -c 'select pg_walfile_name(pg_current_wal_insert_lsn())')
strategy=''
if [ "$major" -ge 15 ]; then
    strategy='strategy file_copy'
fi
sql >/dev/null <<SQL
checkpoint;
select pg_create_restore_point('golden point');
delete from t where id = 1;
update t set filler = 'hot' where id = 2;
update t set filler = repeat('y', 900) where id = 3;
select count(*) from (select 1 from t where id between 200 and 203 for update) locked;
insert into t select 1000 + i, 'new' from generate_series(1, 20) i;
copy t from program 'for i in 1 2 3 4 5 6 7 8 9; do printf "%d\tcopied\n" "\$((2000 + i))"; done';
begin;
insert into t values (3001, 'a');
savepoint a;
insert into t values (3002, 'b');
savepoint b;
insert into t values (3003, 'c');
commit;
begin;
insert into t values (3004, 'undone');
rollback;
drop table doomed;
begin;
insert into t values (3005, 'd');
savepoint a;
create table dropped_with_gid (x int);
prepare transaction 'golden gid';
commit prepared 'golden gid';
begin;
create table undone_with_gid (x int);
prepare transaction 'undone gid';
rollback prepared 'undone gid';
truncate t;
insert into t select i, 'again' from generate_series(1, 30) i;
select nextval('counter');
select pg_logical_emit_message(false, 'edge', repeat('over two edges ', 80000));
select pg_logical_emit_message(true, 'golden', 'message');
create database copied template template0 $strategy;
drop database copied;
vacuum (freeze) t;
SQL
last_lsn=$(sql -c 'select pg_current_wal_lsn()')
last=$(sql -c 'select pg_walfile_name(pg_current_wal_insert_lsn())')
sql -c 'select pg_switch_wal()' -c 'checkpoint' >/dev/null
out=$here/$major
mkdir -p "$out"
for path in "$work"/data/pg_wal/????????????????????????; do
    segment=${path##*/}
    if [[ ! $segment < $first && ! $segment > $last ]]; then
        zstd -q -19 -f "$path" -o "$out/$segment.zst"
    fi
done
if [ "$major" -ge 15 ]; then
    # What the version's own tool reads in them.
    sql -F ' ' -c "select start_lsn, end_lsn, prev_lsn, xid, resource_manager, record_length, fpi_length
        from pg_get_wal_records_info('$first_lsn', '$last_lsn')" | zstd -q -19 -f -o "$out/records.zst"
fi
"$bin/pg_ctl" -D "$work/data" -m fast stop >/dev/null
zstd -q -19 -f "$work/data/global/pg_control" -o "$out/pg_control.zst"
