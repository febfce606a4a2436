"""kdx distils a large causal language model into a small one, and makes a family of such runs comparable."""

__version__ = "0.1.0"
