"""The version of lillama: the build reads it here, for metadata exist only where the package is installed."""

__version__ = "0.4.0"
