//! Golden tests: chat.
