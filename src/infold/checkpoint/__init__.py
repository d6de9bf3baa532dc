"""BYTES ON DISK: names, dtypes, shapes, offsets. Knows no method and no format."""
