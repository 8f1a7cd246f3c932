"""Contracts and machinery: layouts, plans, methods, hosts' view of a prompt, the compactor and the runtime."""
