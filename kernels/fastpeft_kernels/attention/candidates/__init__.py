"""Attention by others, and ours in other ways, one file each.

Each is chosen where `fastpeft tune` found it to be fastest, or asked for by name.
"""
