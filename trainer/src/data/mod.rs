//! Chat data: rows, chat template, tokenizer, images and videos, samples.
