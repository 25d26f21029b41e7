"""What is trained: models, texts, tokens, blocks."""
