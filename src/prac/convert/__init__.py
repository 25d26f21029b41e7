"""From what a user asked for to a compressed model: watched, planned, swapped, summed up, undone."""
