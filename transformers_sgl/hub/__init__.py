"""The embedded pair, and publishing pairs on the Hub."""

from transformers_sgl.hub.contents import Finding
from transformers_sgl.hub.embedded import embedded_pair
from transformers_sgl.hub.publishing import Publication, PublishedFile, publish
from transformers_sgl.hub.validation import validate

__all__ = ["Finding", "Publication", "PublishedFile", "embedded_pair", "publish", "validate"]
