"""The peers, each run in a virtual environment of its own (see setup)."""
