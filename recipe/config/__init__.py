"""Settings: defaults, then YAML, then flags, checked. Imports no torch."""
