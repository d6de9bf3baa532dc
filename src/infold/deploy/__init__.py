"""The bundle that a server loads, its smoke test, and the checklist."""
