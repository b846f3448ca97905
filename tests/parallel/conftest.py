"""`device`: pytest --device cpu|cuda."""

from tests.helpers.device import device

__all__ = ["device"]
