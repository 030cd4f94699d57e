"""One attention call: where it is, how a strategy computes in it, and what is recorded."""
