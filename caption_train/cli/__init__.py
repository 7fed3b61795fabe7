"""Turns command lines into options, and exceptions into exit codes."""
