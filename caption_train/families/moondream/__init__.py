"""The Moondream 2 family: a native model, its processors, and conversion of official checkpoints."""
