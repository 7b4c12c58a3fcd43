"""One command of the command line in each file: its options, the call of the library, its table."""
