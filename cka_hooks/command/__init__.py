"""The command line. Each command is one file, and `cli` has the table of them."""
