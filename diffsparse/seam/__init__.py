"""How a Diffusers model is adopted, watched and given back."""
