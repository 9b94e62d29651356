"""The commands of the command line: flags, a call, what is printed; one file for each kind of work."""
