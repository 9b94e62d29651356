"""Recorded runs: settings → a saved adapter and a result."""
