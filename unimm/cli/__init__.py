"""The command line, `unimm`."""
