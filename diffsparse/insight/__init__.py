"""What a run costs, and what attention looks like."""
