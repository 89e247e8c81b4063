"""Token scores and the figures made of them."""
