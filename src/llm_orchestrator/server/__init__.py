"""The HTTP side: API, health, metrics, event streams. It decides nothing about runs."""
