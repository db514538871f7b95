"""The command line: parses, calls one operation, shows the records it yields."""
