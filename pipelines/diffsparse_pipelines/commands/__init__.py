"""The commands: each an ordinary function, whose annotations say what its options are called and what they take."""
