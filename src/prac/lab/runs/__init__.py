"""Training runs in folders, one or several."""
