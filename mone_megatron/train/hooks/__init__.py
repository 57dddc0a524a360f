"""What a run tells, measures and keeps between steps; one hook a file."""
