"""A backbone and its named adapters."""
