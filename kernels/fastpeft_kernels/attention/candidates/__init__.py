"""Attention by others, one file each: chosen where `fastpeft tune` found one to be fastest, or asked for by name."""
