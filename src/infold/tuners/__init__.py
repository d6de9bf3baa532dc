"""TRAINING: adapters on a transformers model, their data and the training run."""
