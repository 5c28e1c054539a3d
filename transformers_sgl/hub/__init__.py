"""Where ready-made pairs come from, and how they get to the Hub."""

from transformers_sgl.hub.embedded import embedded_pair
from transformers_sgl.hub.publishing import Publication, PublishedFile, publish
from transformers_sgl.hub.validation import Finding, validate

__all__ = ["Finding", "Publication", "PublishedFile", "embedded_pair", "publish", "validate"]
