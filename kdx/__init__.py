"""kdx distils a large causal language model into a small one, and makes a family of such runs comparable."""

import logging

from kdx.version import __version__ as __version__

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns when it is imported, and at each product
