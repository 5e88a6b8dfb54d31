//! Lists in messages.

use std::fmt::Display;

/// The first ten of `items`, and how many more there are.
pub(crate) fn first_ten<T: Display>(items: &[T]) -> String {
    let mut parts: Vec<String> = items.iter().take(10).map(T::to_string).collect();
    let more = items.len().saturating_sub(10);
    if more > 0 {
        parts.push(format!("and {more} more"));
    }
    parts.join("; ")
}
