//! The archive as a place: create-only puts, durable local files, packs, the catalogue cache.
