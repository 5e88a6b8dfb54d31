//! Properties: plans.
