"""The command line: words in, files out."""
