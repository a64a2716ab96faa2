//! The objects of the archive: their names, their bytes, and what they say together.
