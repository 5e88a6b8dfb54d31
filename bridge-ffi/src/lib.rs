//! The C++ and C library over `bridge-core`. Not built yet: this crate is empty and reserves the room.
