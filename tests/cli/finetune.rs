//! The command line: finetune.
