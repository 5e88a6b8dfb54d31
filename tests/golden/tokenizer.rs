//! Golden tests: tokenizer.
