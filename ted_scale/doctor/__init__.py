"""What this machine has for a run, one finding a check; it must work where torch, or any other package, does not."""
