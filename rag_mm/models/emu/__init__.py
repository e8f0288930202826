"""Emu (Sun et al., ICLR 2024): one decoder over text tokens and continuous image embeddings."""
