"""Where tokens stand: the layout of a sequence, and orders that put related tokens side by side."""
