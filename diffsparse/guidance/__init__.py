"""Head-level perturbation guidance: heads, presets, and the hunt for them."""
