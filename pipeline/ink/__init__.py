"""Ink in pictures of any kind, laid as the images of a packed set have it."""
