"""The parts of one training run: its data, its batches and what they are computed from."""
