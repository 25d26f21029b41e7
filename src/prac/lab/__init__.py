"""What experiments need and the library does not: models, data, training, reports."""
