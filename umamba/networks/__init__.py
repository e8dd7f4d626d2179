"""The networks: importing this package registers them all."""

from umamba.networks import (  # noqa: F401  these register
    hymamba,
    lightm_unet,
    mamba_clinix,
    mamba_unet,
    msvm_unet,
    nnmamba,
    partners,
    segmamba,
    swin_umamba,
    umamba,
    umamba_v1,
    uvm_net,
    vm_unet,
    vmamba,
)
from umamba.networks.registry import (
    ModuleEntry,
    NetworkEntry,
    create_module,
    create_network,
    get_entry,
    get_module,
    list_modules,
    list_networks,
    recognize_network,
    register,
    register_module,
)

__all__ = [
    "ModuleEntry",
    "NetworkEntry",
    "create_module",
    "create_network",
    "get_entry",
    "get_module",
    "list_modules",
    "list_networks",
    "recognize_network",
    "register",
    "register_module",
]
