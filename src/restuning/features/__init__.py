"""Features of a frozen backbone, computed once: in memory for a run, in a bank on disk for all."""
