"""The version, in a module of its own: above a clone named kdx, Python takes that folder for a package without a body."""

__version__ = "0.1.0"
