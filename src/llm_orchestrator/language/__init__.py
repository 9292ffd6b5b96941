"""What a user writes: YAML, JSON or decorated Python; all become one Definition."""
