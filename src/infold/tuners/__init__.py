"""TRAINING. Adapters as they are made: attached, trained, saved, combined."""
