"""Fixtures and hooks that every test shares; a folder's own stand in its own conftest.py."""

pytest_plugins = ["tests.postgres"]
