"""What all the rest stands on and that knows nothing of compression."""
