"""Real disasters, on purpose, with an independent ledger."""
