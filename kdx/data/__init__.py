"""Rows of text → conversations → tokens → batches."""

from kdx.data.sources import Conversation as Conversation
from kdx.data.sources import Dropped as Dropped
from kdx.data.sources import register_source as register_source
