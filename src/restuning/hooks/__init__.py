"""How tuners are attached to a frozen backbone, and its features read, while a `with` block lasts."""
