"""One verb a module: the Python API. No click, no rich, no printing."""
