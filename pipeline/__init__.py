"""What runs where, and the command line."""

__version__ = "0.1.0"
