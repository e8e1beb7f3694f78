"""Reading checkpoint files."""
