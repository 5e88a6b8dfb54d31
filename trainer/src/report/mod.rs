//! What users see: tables, progress, plots. The only place that prints.
