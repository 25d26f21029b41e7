"""What each layer loses, measured while a model trains."""
