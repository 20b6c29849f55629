"""GVE: one model that embeds text, images, videos and any mix of them for retrieval (arXiv 2510.27571)."""

__version__ = "0.1.0"
