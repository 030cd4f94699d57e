"""The commands of evaluation: each an ordinary function, whose annotations define its options."""
