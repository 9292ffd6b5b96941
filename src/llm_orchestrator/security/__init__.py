"""Who did what: the audit log, its writer and its check."""
