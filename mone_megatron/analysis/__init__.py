"""What people look at after a run: reading, plotting, reporting and comparing runs."""
