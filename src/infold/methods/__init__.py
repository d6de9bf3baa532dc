"""The ways to fine-tune with few parameters, and which of them end in one weight."""
