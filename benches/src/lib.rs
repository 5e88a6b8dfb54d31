//! What the criterion suites share: synthetic models at real shapes.
