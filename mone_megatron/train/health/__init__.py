"""What watches over a run: hangs, lost ranks, signals, bad losses, alerts."""
