"""Attention whose memory grows with the number of tokens, not with its square."""
