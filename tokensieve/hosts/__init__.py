"""Model families: one file per lineage, mostly declarations."""

from tokensieve.hosts.base import Host
from tokensieve.hosts.registry import host_class, host_for, host_for_type, list_hosts

__all__ = ["Host", "host_class", "host_for", "host_for_type", "list_hosts"]
