"""Memory, time and errors, measured side by side."""
