"""Compression methods: one file each, named by its slug."""
