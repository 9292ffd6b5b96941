"""The engine: decides by one table, replays one journal, drives runs."""
