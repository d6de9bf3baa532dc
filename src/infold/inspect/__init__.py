"""WHAT IS THERE: describes adapters, checkpoints and merged folders."""
