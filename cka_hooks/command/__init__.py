"""The command line: words in, files out. Each command is one file, and `cli` has the table of them."""
