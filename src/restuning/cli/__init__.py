"""The command line: `main.py` has the table of commands, and each is one file by its name."""
