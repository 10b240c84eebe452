"""Where other libraries' versions and attribute names are known, one file each."""
