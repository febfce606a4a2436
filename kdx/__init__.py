"""kdx distils a large causal language model into a small one, and makes a family of such runs comparable."""

from kdx.version import __version__ as __version__
