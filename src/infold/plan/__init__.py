"""DECISIONS from headers alone: match keys, layouts, edits, sizes, refusals. Milliseconds."""
