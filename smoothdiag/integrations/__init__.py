"""Callbacks and writers for training frameworks; importing this package imports none of them."""
