"""Known models and their defaults, the embedded tiny model, and generation."""
