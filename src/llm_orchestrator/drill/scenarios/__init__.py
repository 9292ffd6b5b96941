"""The scenarios, one YAML file each (scenario.py says what may stand in it)."""
