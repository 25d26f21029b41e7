"""What was measured, for people: tables, plots, a page."""
