//! Golden tests: delta_rule.
