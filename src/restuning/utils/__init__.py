"""Files, hubs, processes, measurements."""
