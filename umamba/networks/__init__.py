"""The networks: importing this package registers them all."""

from umamba.networks import umamba, umamba_v1  # registers
from umamba.networks.registry import (
    NetworkEntry,
    create_network,
    get_entry,
    list_networks,
    recognize_network,
    register,
)

__all__ = [
    "NetworkEntry",
    "create_network",
    "get_entry",
    "list_networks",
    "recognize_network",
    "register",
    "umamba",
    "umamba_v1",
]
