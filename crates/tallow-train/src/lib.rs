//! Part of tallow.
