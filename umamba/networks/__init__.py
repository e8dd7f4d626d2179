"""The networks: importing this package registers them all."""

from umamba.networks import (  # noqa: F401  these register
    hymamba,
    lightm_unet,
    mamba_clinix,
    msvm_unet,
    nnmamba,
    segmamba,
    swin_umamba,
    umamba,
    umamba_v1,
    uvm_net,
    vm_unet,
)
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
]
