"""One file per step type: leaves execute, control steps plan."""
