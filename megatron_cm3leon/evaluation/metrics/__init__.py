"""Metrics as pure functions, each equal to its reference implementation."""
