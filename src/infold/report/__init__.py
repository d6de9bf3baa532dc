"""JSON records in, one HTML page out. Imports no machinery, so that old results render anew."""
