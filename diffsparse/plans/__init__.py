"""What offline searches found, and files that keep it."""
