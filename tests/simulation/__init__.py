"""Deterministic simulation: the production engine and store code over a simulated PostgreSQL."""
