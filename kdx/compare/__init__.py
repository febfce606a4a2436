"""Many runs → one comparison: a table, files and a page."""

from kdx.compare.read import compare as compare
from kdx.compare.read import main as main
