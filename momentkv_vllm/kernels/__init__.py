"""Kernel families and what they share. reference.py is the specification; dispatch.py chooses a family."""
