"""The store: one journal, one way to write it, thin adapters per database."""
