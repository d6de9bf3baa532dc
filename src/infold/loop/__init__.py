"""Collect, train, merge, evaluate, again: a model that learns from its own accepted answers."""
