"""Defines every flag as a field of a frozen dataclass, with the checks that need no model."""
